"""What the engine is given next: a slice of tokens, shared by the requests that wait.

Pure but for the jobs' counters, which `next_slice` moves on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qrank.scoring.inputs import ModelInput

PREFIXES = 4
"""A prefix is read once a share, so a share has at least as many times its tokens."""


@dataclass(eq=False)
class Job:
    """A request in the queue.

    Attributes:
        inputs: of its pairs, in their order.
        arrived: by `time.perf_counter`.
        deadline: when its budget is used; None: never.
        done: resolves when nothing more is to come.
        logits: of its inputs; shape [n].
        first: inputs of its first pair, which are scored whatever its budget.
        stop: inputs that the engine will be given: all, or fewer once the budget is used.
        dispatched: inputs that it was given, from the first.
        in_flight: slices with inputs of it that are not back yet.
        tokens_served: tokens that the engine was given.
    """

    inputs: list[ModelInput]
    arrived: float
    deadline: float | None
    done: asyncio.Future[None]
    logits: NDArray[np.float32] = field(init=False)
    first: int = field(init=False)
    stop: int = field(init=False)
    dispatched: int = 0
    in_flight: int = 0
    tokens_served: int = 0

    def __post_init__(self) -> None:
        self.logits = np.zeros(len(self.inputs), np.float32)
        self.first = sum(each.owner == self.inputs[0].owner for each in self.inputs)
        self.stop = len(self.inputs)

    @property
    def waiting(self) -> int:
        """Inputs that the engine is still to be given."""
        return self.stop - self.dispatched


@dataclass(frozen=True)
class Share:
    """A job's part of a slice: its inputs `start` to `stop`, so many tokens to read."""

    job: Job
    start: int
    stop: int
    tokens: int

    @property
    def inputs(self) -> list[ModelInput]:
        """The inputs themselves."""
        return self.job.inputs[self.start : self.stop]


def marginal_tokens(after: ModelInput, before: ModelInput | None) -> int:
    """Tokens that are read for an input after another: a prefix they share is read once."""
    shared = before is not None and after.prefix is before.prefix
    return len(after.ids) if shared else after.tokens


def next_slice(
    jobs: Iterable[Job], tokens: float, least: int, now: float, rate: float
) -> list[Share]:
    """The next slice; `dispatched` and `tokens_served` of the jobs in it are moved on.

    Args:
        jobs: in the order in which they are served.
        tokens: that the slice may hold.
        least: inputs that it holds whatever their length, so that every thread has one.
        now: by `time.perf_counter`.
        rate: tokens a second.

    Returns:
        Nothing where nothing waits.
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
