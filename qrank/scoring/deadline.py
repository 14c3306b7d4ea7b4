"""A time budget: documents are scored slice by slice, and the speed is learnt on the way.

`Reranker.rank` and the server both guarantee: documents are scored in the given order, as long as
the next ones are expected to finish in time; the first is always scored. Unscored documents follow
in their order. The speed is learnt during scoring, so a budget may be exceeded slightly, and the
first budgets by more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from qrank.scoring.inputs import ModelInput

FIRST = 16
"""Documents encoded in the first step; each later step doubles the total."""

_WEIGHT = 0.25
"""Weight of the latest slice in the moving mean and spread."""

_MEMORY = 60
"""Number of slices after which a speed that was not seen again is forgotten, as it may have been an
outlier."""


@dataclass
class _Rate:
    """Mean seconds per token, their mean deviation, and the number of the slice last seen."""

    mean: float
    spread: float
    seen: int


class LatencyEstimate:
    """Predicts a slice's latency from earlier slices of its size; safe to use from several threads.

    Like the retransmission timer of TCP (RFC 6298), it keeps a moving mean and the mean deviation
    from it.
    """

    def __init__(self) -> None:
        self._rates: dict[int, _Rate] = {}
        self._slices = 0
        self._lock = threading.Lock()

    def learn(self, count: int, tokens: int, seconds: float) -> None:
        """Record the seconds that a slice of `count` documents and `tokens` tokens took."""
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
        """A conservative estimate of a slice's seconds; None if nothing was learnt yet."""
        with self._lock:
            known = self._known()
        if not known:
            return None
        # Larger slices cost less per token, so the next smaller one is the conservative choice.
        smaller = [n for n in known if n <= count]
        rate = known[max(smaller) if smaller else min(known)]
        return (rate.mean + rate.spread) * tokens

    def _known(self) -> dict[int, _Rate]:
        return {n: r for n, r in self._rates.items() if self._slices - r.seen < _MEMORY}

    def fitting(self, tokens: Sequence[int], left: float) -> int:
        """How many of the next documents to score in the seconds left.

        It is a power of two, as the costs of few sizes are learnt quickly. They should take at most
        half of the time left, so that later slices can correct a wrong estimate; only if no
        document fits in that, all of it.

        Args:
            tokens: of each remaining document.
            left: seconds.

        Returns:
            0 if none fits; 1 if nothing was learnt yet.
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

    So no more documents are encoded in vain than are scored, or at most FIRST.
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
    *,
    always: bool = True,
) -> Iterator[list[ModelInput]]:
    """The model inputs to score next, while time is left; the module docstring has the guarantees.

    The caller must score each slice before it asks for the next: the latency is learnt from that.

    Args:
        seconds: budget for encoding and scoring, from the first request for a slice.
        steps: each step encodes some more documents; all inputs of a document are in one step.
        latency: predicts what documents cost, and learns.
        clock: returns the time in seconds.
        always: score the first document even if the time is up.

    Yields:
        All inputs of one or more documents.
    """
    begun, must = clock(), always
    for step in steps:
        waiting = [list(inputs) for _, inputs in groupby(step, key=lambda each: each.owner)]
        while waiting:
            start = clock()
            tokens = [sum(each.tokens for each in inputs) for inputs in waiting]
            left = seconds - (start - begun)
            count = latency.fitting(tokens, left) if left > 0 else 0
            if count == 0 and not must:
                return
            count, must = max(count, 1), False
            yield [each for inputs in waiting[:count] for each in inputs]
            latency.learn(count, sum(tokens[:count]), clock() - start)
            del waiting[:count]
