"""How many documents fit a time: scored slice by slice, the speed learnt on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def score_within(
    budget: float,
    total: int,
    pace: LatencyEstimate,
    encode: Callable[[int, int], Sequence[int]],
    score: Callable[[int, int], object],
    clock: Callable[[], float],
) -> int:
    """Score documents from the first on for as long as the next ones fit; the first always.

    Args:
        budget: seconds, from now on.
        total: documents.
        pace: knows what they cost, and learns.
        encode: makes documents [start, end) ready, and returns how many tokens each has.
        score: scores documents [start, end), all of them encoded.
        clock: seconds.

    Returns:
        How many were scored.
    """
    begun = clock()
    tokens: list[int] = []
    done = 0
    while done < total:
        if done == len(tokens):
            tokens += encode(done, min(max(2 * done, FIRST), total))
        start = clock()
        count = pace.fitting(tokens[done:], budget - (start - begun))
        if count == 0 and done:
            break
        count = max(count, 1)
        score(done, done + count)
        pace.learn(count, sum(tokens[done : done + count]), clock() - start)
        done += count
    return done
