"""Cut work into batches by what a backend pays for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrank.memory import Memory
from qrank.work import Logits, Work

Most = Callable[[int], int | None]
"""Tokens of the longest sequence -> how many a batch may hold; None: any number."""


def cut(work: Work, limit: int, memory: Memory) -> list[NDArray[np.intp]]:
    """`cut_padded`, the prefix counted in every sequence, into batches that find memory."""
    before = len(work.prefix)
    return cut_padded(work.lengths + before, limit, lambda n: memory.most(n - before, before))


def cut_padded(
    lengths: ArrayLike, limit: int, most: Most = lambda longest: None
) -> list[NDArray[np.intp]]:
    """Cut sequences into batches that cost at most `limit` tokens, padding included.

    A batch pays its longest length times its size, so neighbours in length go together. The
    longest come first: memory peaks at once, and parallel streams end at about the same time.

    Args:
        lengths: tokens of each sequence, shape [n].
        limit: padded tokens a batch may hold; a longer sequence gets a batch of its own.
        most: how many sequences a batch may hold.

    Returns:
        Indices into `lengths`; every index stands in exactly one batch.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        end = start + _at_most(max(limit // longest, 1), most(longest))
        batches.append(order[start:end])
        start = end
    return batches


def cut_ragged(
    lengths: ArrayLike, limit: int, count: int, most: Most = lambda longest: None
) -> list[NDArray[np.intp]]:
    """Cut sequences into batches of at most `limit` tokens and `count` sequences, unpadded.

    Args:
        lengths: tokens of each sequence, shape [n].
        limit: tokens a batch may hold; a longer sequence gets a batch of its own.
        count: sequences a batch may hold.
        most: likewise, by the longest of them.

    Returns:
        As `cut_padded`, the longest first too.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        some = _at_most(count, most(int(lengths[order[start]])))
        fitting = np.cumsum(lengths[order[start : start + some]]) <= limit
        end = start + max(int(fitting.sum()), 1)
        batches.append(order[start:end])
        start = end
    return batches


def _at_most(count: int, most: int | None) -> int:
    return count if most is None else min(count, most)


def in_order(batches: Sequence[NDArray[np.intp]], results: Iterable[Logits]) -> Logits:
    """Put the logits of batches back into the order of what was cut, shape [n]."""
    logits = np.empty(sum(map(len, batches)), np.float32)
    for batch, result in zip(batches, results, strict=True):
        logits[batch] = result
    return logits
