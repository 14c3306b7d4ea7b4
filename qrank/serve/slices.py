"""The next slice of tokens for the engine, shared by the waiting requests.

Pure functions, except that `next_slice` advances the jobs' counters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qrank.scoring.inputs import ModelInput

PREFIXES = 4
"""A share has at least this many times its prefix's tokens, as each share reads the prefix."""


@dataclass(eq=False)
class Job:
    """A request in the queue.

    Attributes:
        inputs: of its pairs, in their order.
        arrived: time by `time.perf_counter`.
        deadline: when its budget is used up; None: never.
        done: resolves when no more inputs will be scored.
        logits: of its inputs; shape [n].
        tokens: number that is read for all inputs, the shared prefix once.
        first: number of inputs of its first pair, which are scored whatever the budget.
        stop: number of inputs to give to the engine: all, or fewer once the budget is used up.
        dispatched: number of inputs given to the engine, from the first on.
        in_flight: number of slices with its inputs that the engine has not returned yet.
        tokens_served: number of tokens given to the engine.
    """

    inputs: list[ModelInput]
    arrived: float
    deadline: float | None
    done: asyncio.Future[None]
    logits: NDArray[np.float32] = field(init=False)
    tokens: int = field(init=False)
    first: int = field(init=False)
    stop: int = field(init=False)
    dispatched: int = 0
    in_flight: int = 0
    tokens_served: int = 0

    def __post_init__(self) -> None:
        self.logits = np.zeros(len(self.inputs), np.float32)
        self.tokens = sum(map(marginal_tokens, self.inputs, [None, *self.inputs]))
        self.first = sum(each.owner == self.inputs[0].owner for each in self.inputs)
        self.stop = len(self.inputs)

    @property
    def waiting(self) -> int:
        """Number of inputs still to be given to the engine."""
        return self.stop - self.dispatched


@dataclass(frozen=True)
class Share:
    """A job's part of a slice: its inputs `start` to `stop`, and their number of tokens."""

    job: Job
    start: int
    stop: int
    tokens: int

    @property
    def inputs(self) -> list[ModelInput]:
        """The inputs of the share."""
        return self.job.inputs[self.start : self.stop]


def marginal_tokens(after: ModelInput, before: ModelInput | None) -> int:
    """Tokens read for an input that follows another: a prefix they share is read once."""
    shared = before is not None and after.prefix is before.prefix
    return len(after.ids) if shared else after.tokens


def next_slice(
    jobs: Iterable[Job], tokens: float, least: int, now: float, rate: float
) -> list[Share]:
    """The next slice; advances `dispatched` and `tokens_served` of the jobs in it.

    Args:
        jobs: in the order in which they are served.
        tokens: maximum tokens of the slice.
        least: minimum number of inputs, whatever their length, so that every thread has one.
        now: by `time.perf_counter`.
        rate: tokens per second.

    Returns:
        An empty list if nothing waits.
    """
    shares: list[Share] = []
    left, count = tokens, 0
    for job in jobs:
        room = left if job.deadline is None else min(left, rate * (job.deadline - now))
        least_share = PREFIXES * len(job.inputs[0].prefix)
        if shares and room < least_share:
            continue
        start, given = job.dispatched, 0
        while job.waiting:
            before = job.inputs[job.dispatched - 1] if given else None
            cost = marginal_tokens(job.inputs[job.dispatched], before)
            if given + cost > room and count >= least and (shares or given > least_share):
                break
            given += cost
            count += 1
            job.dispatched += 1
        if given:
            shares.append(Share(job, start, job.dispatched, given))
            job.tokens_served += given
            left -= given
    return shares
