"""A time budget: documents are scored slice by slice, and the speed is learnt on the way.

What is promised, of `Reranker.rank` and of the server alike: documents are scored in the order they
are given, as long as the next ones are expected to be done in time; the first is always scored.
What was not scored follows in its order. How long scoring takes is learnt as it goes, so a budget
may be missed by a little, and the first ones by more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from qrank.scoring.inputs import ModelInput

FIRST = 16
"""Documents that are encoded at first; then twice as many as are there already."""

_WEIGHT = 0.25
"""Of what was seen last, in what is expected."""

_MEMORY = 60
"""Slices after which a speed that was not seen again is forgotten: it may have been a hiccup."""


@dataclass
class _Rate:
    """Seconds a token, how far they stray, and the slice that was last seen."""

    mean: float
    spread: float
    seen: int


class LatencyEstimate:
    """What a slice will cost, by what slices of its size did; safe to use from several threads.

    As a network tells when an answer is overdue (RFC 6298): a moving mean, and how far from it
    things stray on average.
    """

    def __init__(self) -> None:
        self._rates: dict[int, _Rate] = {}
        self._slices = 0
        self._lock = threading.Lock()

    def learn(self, count: int, tokens: int, seconds: float) -> None:
        """A slice of so many documents and tokens took so long."""
        with self._lock:
            self._slices += 1
            found = seconds / max(tokens, 1)
            rate = self._known().get(count)
            if rate is None:
                self._rates[count] = _Rate(found, found / 8, self._slices)
                return
            rate.spread += _WEIGHT * (abs(found - rate.mean) - rate.spread)
            rate.mean += _WEIGHT * (found - rate.mean)
            rate.seen = self._slices

    def expect(self, count: int, tokens: int) -> float | None:
        """Seconds of a slice, on the careful side; None where nothing was learnt yet."""
        with self._lock:
            known = self._known()
        if not known:
            return None
        # Larger slices cost less a token, so the next smaller one is the careful choice.
        smaller = [n for n in known if n <= count]
        rate = known[max(smaller) if smaller else min(known)]
        return (rate.mean + rate.spread) * tokens

    def _known(self) -> dict[int, _Rate]:
        return {n: r for n, r in self._rates.items() if self._slices - r.seen < _MEMORY}

    def fitting(self, tokens: Sequence[int], left: float) -> int:
        """How many of the next documents to score, with so many seconds left.

        A power of two: of those the costs are soon known. Half of the time at most, as long as
        that is one document's: the rest then corrects what was expected wrongly.

        Args:
            tokens: of each document to come.
            left: seconds.

        Returns:
            0 where none fits.
        """
        sizes = [1 << power for power in range(len(tokens).bit_length() - 1, -1, -1)]
        costs = {size: self.expect(size, sum(tokens[:size])) for size in sizes}
        for share in (left / 2, left):
            for size, cost in costs.items():
                if cost is None:
                    return 1
                if cost <= share:
                    return size
        return 0


def doubling(total: int) -> Iterator[int]:
    """Where each step of encoding ends: after FIRST documents, then after twice as many as before.

    So what is encoded in vain is at most as much as what is scored, or FIRST documents.
    """
    stop = min(FIRST, total)
    while stop < total:
        yield stop
        stop = min(2 * stop, total)
    yield total


def score_within(
    seconds: float,
    steps: Iterable[Sequence[ModelInput]],
    latency: LatencyEstimate,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[list[ModelInput]]:
    """The model inputs to score next, while time is left: see the module for what is promised.

    The caller scores what it is given before it asks for more: from that the latency is learnt.

    Args:
        seconds: that encoding and scoring may take, from the first input asked for.
        steps: encodes some more documents; each document's inputs stand in one step.
        latency: knows what documents cost, and learns.
        clock: seconds.

    Yields:
        All inputs of one or more documents.
    """
    begun, first = clock(), True
    for step in steps:
        waiting = [list(inputs) for _, inputs in groupby(step, key=lambda each: each.owner)]
        while waiting:
            start = clock()
            tokens = [sum(each.tokens for each in inputs) for inputs in waiting]
            count = latency.fitting(tokens, seconds - (start - begun))
            if count == 0 and not first:
                return
            count, first = max(count, 1), False
            yield [each for inputs in waiting[:count] for each in inputs]
            latency.learn(count, sum(tokens[:count]), clock() - start)
            del waiting[:count]
