"""Cut sequences into batches by what a backend pays for them."""

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
"""Tokens of the longest sequence -> how many a batch may hold; None: any number."""


def cut(sequences: Sequences, limit: int, memory: MemoryBudget) -> list[NDArray[np.intp]]:
    """`cut_padded`, the prefix counted in every sequence, into batches that find memory."""
    before = len(sequences.prefix)
    lengths = sequences.lengths + before
    return cut_padded(lengths, limit, lambda n: memory.max_batch_size(n - before, before))


def cut_padded(
    lengths: ArrayLike, limit: int, max_size: MaxBatchSize = lambda longest: None
) -> list[NDArray[np.intp]]:
    """Cut sequences into batches that cost at most `limit` tokens, padding included.

    A batch pays its longest length times its size, so neighbours in length go together. The
    longest come first: memory peaks at once, and parallel streams end at about the same time.

    Args:
        lengths: tokens of each sequence, shape [n].
        limit: padded tokens a batch may hold; a longer sequence gets a batch of its own.
        max_size: how many sequences a batch may hold.

    Returns:
        Indices into `lengths`; every index stands in exactly one batch.
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
        limit: tokens a batch may hold; a longer sequence gets a batch of its own.
        count: sequences a batch may hold.
        max_size: likewise, by the longest of them.

    Returns:
        As `cut_padded`, the longest first too.
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
    """Run a batch; where memory does not suffice for it, its halves, and theirs.

    Args:
        batch: at least one sequence.
        run: gives an array of a row a sequence, or raises MemoryError.

    Returns:
        Such an array; of a single sequence, whatever `run` gives.

    Raises:
        TargetError: memory does not suffice for a single sequence.
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
    # Not within the handler: the error holds on to what the attempt had taken.
    first, second = np.array_split(np.arange(len(batch)), 2)
    return np.concatenate([in_halves(batch.take(half), run) for half in (first, second)])


def out_of_memory(error: Exception) -> bool:
    """Whether a runtime's error is that memory did not suffice: each says it in its own way."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def _at_most(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def in_order(batches: Sequence[NDArray[np.intp]], results: Iterable[Logits]) -> Logits:
    """Put the logits of batches back into the order of what was cut, shape [n]."""
    logits = np.empty(sum(map(len, batches)), np.float32)
    for batch, result in zip(batches, results, strict=True):
        logits[batch] = result
    return logits
