"""Cut sequences into batches by their cost to a backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import TargetError
from qrank.scoring.memory import MemoryBudget

_OUT_OF_MEMORY = re.compile(
    # onnxruntime's arena; CUDA, ROCm and MPS; cuBLAS; C++; DirectML and Windows; torch on the CPU;
    # MLX's allocators, and Metal.
    "failed to allocate memory|smaller than requested bytes|out of memory|alloc_failed|bad.alloc"
    "|not enough memory|can't allocate memory"
    "|unable to allocate|attempting to allocate|insufficient memory",
    re.IGNORECASE,
)

CPU_BATCHES = (160, 640, 1280)
"""Padded tokens per batch worth trying on the CPU for graphs, an encoder's default first. For
encoders, larger ones rarely speed up matrix products, and add padding (measured without AMX:
benchmarks/batching.py); with the default, most documents are a batch of their own."""

DECODER_CPU_BATCH = 320
"""The default on the CPU for causal models: each batch reads all weights, of which they have many,
and on AMX the tokens of a short document fill no product (without VNNI, the batch makes no
difference). Twice as many took 0.4 GB more at the size of Qwen3-Reranker-0.6B, on two streams."""

TILE_BATCHES = (640, 160, 1280)
"""As CPU_BATCHES, where products are computed in tiles (AMX): few rows leave those empty, which
costs more than padding. `mini` ran 21 % (int8) and 40 % (fp16) faster in bf16 with 640 than with
160. A causal model's default too: at the size of Qwen3-Reranker-0.6B, in int8, it takes 1.3 GB, and
1,280 take 1.8."""

DEVICE_BATCHES = (16_384, 4_096)
"""The same on accelerators, which need large batches, the default of all models first."""

SHORTEST = 64
"""Where a runtime compiles each length, lengths are rounded up to this times a power of two."""

MaxBatchSize = Callable[[int], int | None]
"""Tokens of the longest sequence -> maximum number of sequences in a batch; None: unlimited."""


def default_batch(device: str, decoder: bool, *, tiles: bool = False) -> int:
    """Padded tokens per batch of a graph if nobody says how many.

    Args:
        device: `cpu`, or an accelerator's name.
        decoder: whether the graph takes a shared prefix.
        tiles: whether the runtime computes products in tiles on this CPU.
    """
    if device != "cpu":
        return DEVICE_BATCHES[0]
    if tiles:
        return TILE_BATCHES[0]
    return DECODER_CPU_BATCH if decoder else CPU_BATCHES[0]


def rounded_up(value: int, least: int = 1) -> int:
    """A number, rounded up to `least` times a power of two."""
    while least < value:
        least *= 2
    return least


def rounded_length(longest: int, limit: int) -> int:
    """The length to pad to where a runtime compiles each length: few differ, of up to `limit`."""
    return min(rounded_up(longest, SHORTEST), limit)


def cut(
    sequences: Sequences, limit: int, memory: MemoryBudget, streams: int = 1
) -> list[NDArray[np.intp]]:
    """Cut like `cut_padded`, to fit the memory budget and to give every stream as much to do.

    The shared prefix is computed once, so only what follows it counts.

    Args:
        sequences: at least one.
        limit: see `cut_padded`.
        memory: the budget.
        streams: how many batches run at once.
    """
    before = len(sequences.prefix)
    lengths = sequences.lengths
    if streams > 1:
        total, longest = int(lengths.sum()), int(lengths.max(initial=0))
        rounds = -(-total // (max(limit, 1) * streams))
        # The last sequence of a batch may exceed its share, so that none is left over.
        share = -(-total // max(rounds * streams, 1)) + max(longest - 1, 0)
        limit = min(limit, share)
    return cut_padded(lengths, limit, lambda n: memory.max_batch_size(n, before))


def cut_padded(
    lengths: ArrayLike, limit: int, max_size: MaxBatchSize = lambda longest: None
) -> list[NDArray[np.intp]]:
    """Cut sequences into batches that cost at most `limit` tokens, padding included.

    A batch costs its longest length times its size, so sequences of similar length go together.
    The longest come first: memory peaks at the start, and parallel streams end at about the same
    time.

    Args:
        lengths: tokens of each sequence, shape [n].
        limit: maximum padded tokens in a batch; a longer sequence gets its own batch.
        max_size: maximum number of sequences in a batch, given the longest of them.

    Returns:
        Indices into `lengths`; every index is in exactly one batch.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        end = start + _at_most(max(limit // longest, 1), max_size(longest))
        batches.append(order[start:end])
        start = end
    return batches


def cut_ragged(
    lengths: ArrayLike, limit: int, count: int, max_size: MaxBatchSize = lambda longest: None
) -> list[NDArray[np.intp]]:
    """Cut sequences into batches of at most `limit` tokens and `count` sequences, unpadded.

    Args:
        lengths: tokens of each sequence, shape [n].
        limit: maximum tokens in a batch; a longer sequence gets its own batch.
        count: maximum number of sequences in a batch.
        max_size: maximum number of sequences in a batch, given the longest of them.

    Returns:
        As for `cut_padded`, also with the longest first.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        some = _at_most(count, max_size(int(lengths[order[start]])))
        fitting = np.cumsum(lengths[order[start : start + some]]) <= limit
        end = start + max(int(fitting.sum()), 1)
        batches.append(order[start:end])
        start = end
    return batches


def in_halves(batch: Sequences, run: Callable[[Sequences], Any]) -> Any:
    """Run a batch; if memory runs out, split it in half and try again, recursively.

    Args:
        batch: at least one sequence.
        run: returns an array with one row per sequence, or raises MemoryError.

    Returns:
        Such an array; for a single sequence, whatever `run` returns.

    Raises:
        TargetError: there is not enough memory for a single sequence.
    """
    try:
        return run(batch)
    except MemoryError as error:
        if len(batch) == 1:
            length = len(batch.prefix) + int(batch.lengths[0])
            raise TargetError(
                f"memory does not suffice for a single pair of {length:,} tokens: {error}. Allow "
                "fewer (--max-length), or name a smaller variant or another device"
            ) from error
    # Outside the handler, as the error keeps the failed attempt's memory alive.
    first, second = np.array_split(np.arange(len(batch)), 2)
    return np.concatenate([in_halves(batch.take(half), run) for half in (first, second)])


def out_of_memory(error: Exception) -> bool:
    """Whether a runtime's error means that memory ran out; every runtime words it differently."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def _at_most(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def in_order(batches: Sequence[NDArray[np.intp]], results: Iterable[Logits]) -> Logits:
    """Put the logits of batches back into the order of the sequences, shape [n]."""
    logits = np.empty(sum(map(len, batches)), np.float32)
    for batch, result in zip(batches, results, strict=True):
        logits[batch] = result
    return logits
