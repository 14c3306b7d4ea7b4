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
    # onnxruntime's arena; CUDA, ROCm and MPS; cuBLAS; C++; DirectML and Windows; torch on the CPU.
    "failed to allocate memory|smaller than requested bytes|out of memory|alloc_failed|bad.alloc"
    "|not enough memory|can't allocate memory",
    re.IGNORECASE,
)

MaxBatchSize = Callable[[int], int | None]
"""Tokens of the longest sequence -> maximum number of sequences in a batch; None: unlimited."""


def cut(sequences: Sequences, limit: int, memory: MemoryBudget) -> list[NDArray[np.intp]]:
    """Cut like `cut_padded`, counting the prefix in each sequence, to fit the memory budget."""
    before = len(sequences.prefix)
    lengths = sequences.lengths + before
    return cut_padded(lengths, limit, lambda n: memory.max_batch_size(n - before, before))


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
