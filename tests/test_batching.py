"""Properties of cutting work into batches, and of splitting batches if memory runs out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import TargetError
from qrank.scoring.batching import cut_padded, in_halves, out_of_memory

LENGTHS = st.lists(st.integers(0, 600), max_size=60)
LIMIT = st.integers(1, 2000)


@given(LENGTHS, LIMIT)
def test_every_index_stands_in_one_batch(lengths: list[int], limit: int) -> None:
    indices = [int(i) for batch in cut_padded(lengths, limit) for i in batch]
    assert sorted(indices) == list(range(len(lengths)))


@given(LENGTHS, LIMIT)
def test_only_a_single_sequence_may_cost_more_than_the_limit(
    lengths: list[int], limit: int
) -> None:
    for batch in cut_padded(lengths, limit):
        assert len(batch) >= 1
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= limit


@given(LENGTHS, LIMIT)
def test_longest_come_first_and_equal_ones_keep_their_order(lengths: list[int], limit: int) -> None:
    order = [int(i) for batch in cut_padded(lengths, limit) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: -lengths[i])


@given(LENGTHS, LIMIT)
def test_batches_are_as_full_as_they_may_be(lengths: list[int], limit: int) -> None:
    for batch in cut_padded(lengths, limit)[:-1]:
        longest = max(1, *(lengths[i] for i in batch), 1)
        assert longest * (len(batch) + 1) > limit


def test_nothing_gives_no_batches() -> None:
    assert cut_padded([], 100) == []


def test_empty_sequences_are_batched_too() -> None:
    (batch,) = cut_padded([0, 0, 0], 100)
    assert batch.tolist() == [0, 1, 2]


def test_lengths_may_be_an_array() -> None:
    assert [b.tolist() for b in cut_padded(np.array([1, 3, 2]), 4)] == [[1], [2, 0]]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), room=st.integers(9, 60))
def test_where_memory_does_not_suffice_the_same_comes_of_smaller_batches(
    lengths: list[int], room: int
) -> None:
    """With memory for `room` padded tokens and at least one sequence."""
    tried: list[int] = []

    def run(batch: Sequences) -> Logits:
        tried.append(len(batch))
        if len(batch) * int(batch.lengths.max()) > room:
            raise MemoryError("too many")
        return np.array([ids.sum() for ids in batch.ids], np.float32)

    work = Sequences([np.full(length, i, np.int32) for i, length in enumerate(lengths)])
    expected = [i * length for i, length in enumerate(lengths)]
    assert in_halves(work, run).tolist() == expected
    assert tried[0] == len(lengths)
    assert sum(tried[1:]) >= len(lengths) or len(tried) == 1


def test_a_single_pair_that_is_too_large_is_told_with_its_tokens() -> None:
    def run(batch: Sequences) -> Logits:
        if max(map(len, batch.ids)) > 5:
            raise MemoryError("Failed to allocate memory")
        return np.zeros(len(batch), np.float32)

    work = Sequences([np.zeros(n, np.int32) for n in (3, 900, 2)], prefix=np.zeros(100, np.int32))
    with pytest.raises(
        TargetError, match=r"a single pair of 1,000 tokens: Failed to.*--max-length"
    ):
        in_halves(work, run)


@pytest.mark.parametrize(
    "message",
    [
        # onnxruntime: on CUDA with and without its arena, on DirectML, on the CPU.
        "Non-zero status code returned while running MatMul node. Status Message: bfc_arena.cc:376 "
        "AllocateRawInternal Failed to allocate memory for requested buffer of size 1610612736",
        "BFCArena::Extend Available memory of 0 is smaller than requested bytes of 2048",
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "8007000E Not enough memory resources are available to complete this operation.",
        "running BiasGelu node. Name:'BiasGelu' Status Message: std::bad_alloc",
        # torch: on CUDA, on MPS, on the CPU.
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB",
        "MPS backend out of memory (MPS allocated: 17.92 GB, max allowed: 18.13 GB).",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes.",
    ],
)
def test_every_runtimes_word_for_too_little_memory_is_known(message: str) -> None:
    assert out_of_memory(RuntimeError(message))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("Name:'Gather' indices element out of data bounds"))
