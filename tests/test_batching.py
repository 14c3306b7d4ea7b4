"""Laws of cutting work into padded batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qrank.batching import cut_padded

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
