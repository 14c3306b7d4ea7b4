"""One model's queue: the pairs of all requests, cut into slices that its engine scores.

A slice is so many tokens as take about SLICE_SECONDS. Every other one is filled from the oldest
request on, those between from the request that has had least so far. So the oldest moves on at half
the speed of the machine or more, and a short request waits for a few slices, however many documents
the others have.

What a time budget promises stands in `qrank.scoring.deadline`. Here the engine's speed keeps it,
which the slices of all requests tell.

All state is the event loop's: there are no locks. The engine runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qrank.engine import Engine
from qrank.errors import InputError, QrankError
from qrank.scoring.inputs import ModelInput, stops_by_size
from qrank.scoring.ranking import ScoredPairs
from qrank.serve.metrics import Metrics
from qrank.serve.request import RequestError, RerankOutcome, RerankTask

log = logging.getLogger("qrank.serve")

SLICE_SECONDS = 0.05
"""How long a slice should take: what a short request waits, mostly, and a budget's grain."""

SLICE_TOKENS = 65_536
"""Most tokens of a slice, however fast the engine."""

PREFIX_TURNS = 4
"""A prefix is read once a turn, so a turn is at least as many times as long as it."""

IN_FLIGHT = 2
"""Slices given to the engine at a time: what one leaves idle, the next takes up."""

ENCODERS = 2
"""Threads that turn text into tokens, beside the engine's; and one for short requests alone."""

STEP_CHARACTERS = 100_000
"""Text that is turned into tokens at a time, so that requests take turns and can be left."""

CHARACTERS_A_TOKEN = 4
"""To judge a request by before it is encoded."""


@dataclass(eq=False)
class Job:
    """A request in the queue.

    Attributes:
        items: its model inputs, in the order of its pairs.
        arrived: by `time.perf_counter`.
        ends: when its budget is used; None: never.
        logits: of its items; shape [n].
        first: items of its first pair, which are scored whatever its budget.
        handed: items given to the engine, from the first.
        end: items that will be given to it: all, or fewer once the budget is used.
        flying: slices with items of it that are not back yet.
        had: tokens given to the engine.
        done: resolves when nothing more is to come.
    """

    items: list[ModelInput]
    arrived: float
    ends: float | None
    done: asyncio.Future[None]
    logits: NDArray[np.float32] = field(init=False)
    first: int = field(init=False)
    end: int = field(init=False)
    handed: int = 0
    flying: int = 0
    had: int = 0

    def __post_init__(self) -> None:
        self.logits = np.zeros(len(self.items), np.float32)
        self.first = sum(item.owner == self.items[0].owner for item in self.items)
        self.end = len(self.items)

    @property
    def waiting(self) -> int:
        """Items the engine is still to be given."""
        return self.end - self.handed


@dataclass(frozen=True)
class Turn:
    """Items `start` to `stop` of a job, in one slice: so many tokens to read."""

    job: Job
    start: int
    stop: int
    tokens: int

    @property
    def items(self) -> list[ModelInput]:
        """The items themselves."""
        return self.job.items[self.start : self.stop]


def reading(item: ModelInput, before: ModelInput | None) -> int:
    """Tokens that are read for an item after another: a prefix they share is read once."""
    shared = before is not None and item.prefix is before.prefix
    return len(item.ids) if shared else item.tokens


def cut(jobs: Iterable[Job], tokens: float, least: int, now: float, rate: float) -> list[Turn]:
    """The next slice; `handed` and `had` of the jobs in it are moved on.

    Args:
        jobs: whose turn it is first comes first.
        tokens: that the slice may hold.
        least: items that it holds whatever their length, so that every thread has one.
        now: by `time.perf_counter`.
        rate: tokens a second.

    Returns:
        Nothing where nothing waits.
    """
    turns: list[Turn] = []
    left, count = tokens, 0
    for job in jobs:
        room = left if job.ends is None else min(left, rate * (job.ends - now))
        worth = PREFIX_TURNS * len(job.items[0].prefix)
        if turns and room < worth:
            continue
        start, given = job.handed, 0
        while job.waiting:
            cost = reading(job.items[job.handed], job.items[job.handed - 1] if given else None)
            if given + cost > room and count >= least and (turns or given > worth):
                break
            given += cost
            count += 1
            job.handed += 1
        if given:
            turns.append(Turn(job, start, job.handed, given))
            job.had += given
            left -= given
    return turns


class Batcher:
    """Scores requests with one engine. Made and used on one event loop."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        metrics: Metrics,
        *,
        queue_tokens: int,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Start.

        Args:
            name: the model's, for people.
            engine: ready.
            metrics: where to count.
            queue_tokens: how many may wait; a request that would be more is refused, but for one
                that finds the queue empty.
            failed: called when a bug of ours ends the queue: it serves nothing any more.
        """
        self._engine = engine
        self.queued = 0
        self._failed = failed
        self._broken = False
        self._name = name
        self._metrics = metrics.of(name, engine.target.name)
        self._limit = queue_tokens
        self._jobs: list[Job] = []
        self._least_first = False
        self._wake = asyncio.Event()
        self._rate = 0.0
        self._free = 0.0
        self._recent = np.zeros(2)
        self._engine_threads = ThreadPoolExecutor(IN_FLIGHT, f"qrank-engine-{name}")
        self._encoders = ThreadPoolExecutor(ENCODERS, f"qrank-encode-{name}")
        self._quick_encoder = ThreadPoolExecutor(1, f"qrank-encode-short-{name}")
        self._feeders = [asyncio.create_task(self._feed()) for _ in range(IN_FLIGHT)]
        for feeder in self._feeders:
            feeder.add_done_callback(self._fed)

    async def close(self) -> None:
        """Stop; what still waits is cancelled."""
        for feeder in self._feeders:
            feeder.cancel()
        await asyncio.gather(*self._feeders, return_exceptions=True)
        for job in self._jobs:
            job.done.cancel()
        for threads in (self._engine_threads, self._encoders, self._quick_encoder):
            threads.shutdown()

    async def score(self, asked: RerankTask, timeout: float) -> RerankOutcome:
        """Score a request's pairs, among those of others.

        To cancel it is to take it out of the queue.

        Args:
            asked: what.
            timeout: seconds it may take in all.

        Raises:
            RequestError: 413 for a pair that does not fit, 422 for what the model does not take,
                429 where too much waits, 500 where the engine fails, 503 where the time is up or
                the queue has ended.
        """
        arrived = time.perf_counter()
        self._check()
        guess = self._guess(asked)
        if self.queued and self.queued + guess > self._limit:
            self._metrics.dropped["overflow"].inc()
            raise RequestError(
                429,
                f"{self.queued:,} tokens wait for {self._name}, and about {guess:,} more would be "
                f"beyond its limit of {self._limit:,}; try again later",
                retry_after=min(max(math.ceil(self.queued / max(self._rate, 1)), 1), 600),
            )
        held = guess
        self._hold(held)
        self._metrics.queue_requests.inc()
        try:
            async with asyncio.timeout(timeout):
                ends = None if asked.budget is None else arrived + asked.budget
                items = await self._encode(asked, ends)
                tokens = sum(map(reading, items, [None, *items]))
                self._hold(tokens - held)
                held = tokens
                self._check()
                job = Job(items, arrived, ends, asyncio.get_running_loop().create_future())
                self._jobs.append(job)
                self._wake.set()
                try:
                    await job.done
                finally:
                    self._jobs.remove(job)
        except TimeoutError:
            self._metrics.dropped["timeout"].inc()
            raise RequestError(
                503, f"not scored within {timeout:g} s; send less, or try again later"
            ) from None
        except asyncio.CancelledError:
            self._metrics.dropped["disconnect"].inc()
            raise
        except InputError as error:
            raise RequestError(422, str(error)) from error
        except QrankError as error:
            log.error("%s: %s", self._name, error)
            raise RequestError(500, str(error)) from error
        finally:
            self._hold(-held)
            self._metrics.queue_requests.dec()
        return self._outcome(job, len(asked.pairs))

    def _guess(self, asked: RerankTask) -> int:
        """Tokens of a request that is not encoded yet."""
        most = math.inf if asked.long_documents == "chunk" else self._engine.max_length
        sizes = (len(query) + len(document) for query, document in asked.pairs)
        return int(sum(min(size // CHARACTERS_A_TOKEN + 1, most) for size in sizes))

    async def _encode(self, asked: RerankTask, ends: float | None) -> list[ModelInput]:
        """A request's items; a part of them where its budget is used before the others are made.

        Long requests take turns, and short ones have a thread of their own.
        """
        steps = self._engine.preparing(
            asked.pairs,
            stops_by_size([len(document) for _, document in asked.pairs], STEP_CHARACTERS),
            asked.instruction,
            asked.long_documents,
            asked.document_tokens,
        )
        short = sum(map(len, {text for pair in asked.pairs for text in pair})) <= STEP_CHARACTERS
        threads = self._quick_encoder if short else self._encoders
        loop = asyncio.get_running_loop()
        items: list[ModelInput] = []
        while some := await loop.run_in_executor(threads, next, steps, None):
            items += some
            if ends is not None and time.perf_counter() >= ends:
                break
        long = next((item.owner for item in items if item.truncated), None)
        if asked.whole and long is not None:
            raise RequestError(
                413, f"text {long} does not fit the model with the query; ask for truncate"
            )
        return items

    def _check(self) -> None:
        if self._broken:
            raise RequestError(
                503, f"the queue of {self._name} has failed, and the server ends; its log says why"
            )

    def _fed(self, feeder: asyncio.Task[None]) -> None:
        """A feeder has ended, which it never does by itself: what waits would wait for ever."""
        if feeder.cancelled() or self._broken:
            return
        self._broken = True
        log.critical("%s: the queue failed", self._name, exc_info=feeder.exception())
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(QrankError("the server failed; its log says why"))
        self._failed()

    async def _feed(self) -> None:
        """Hand slices to the engine, one after the other."""
        while True:
            now = time.perf_counter()
            for job in self._jobs:
                self._settle(job, now)
            waiting = [job for job in self._jobs if job.waiting]
            if self._least_first:
                waiting.sort(key=lambda job: job.had)
            tokens = min(self._rate * SLICE_SECONDS, SLICE_TOKENS)
            turns = cut(waiting, tokens, self._engine.threads, now, self._rate)
            if not turns:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._least_first = not self._least_first
            for turn in turns:
                turn.job.flying += 1
            await self._run(turns)

    async def _run(self, turns: list[Turn]) -> None:
        """Score a slice; where it fails, each request's part by itself, so that one fails alone."""
        items = [item for turn in turns for item in turn.items]
        started = time.perf_counter()
        for turn in turns:
            if turn.start == 0:
                self._metrics.wait.observe(started - turn.job.arrived)
        try:
            logits = await asyncio.get_running_loop().run_in_executor(
                self._engine_threads, self._engine.logits, items
            )
        except Exception as error:  # a backend may raise anything
            if len(turns) > 1:
                log.warning("%s: a batch failed, so its requests run one by one", self._name)
                for turn in turns:
                    if not turn.job.done.done():
                        await self._run([turn])
                return
            self._fail(turns[0], error)
            return
        tokens = sum(turn.tokens for turn in turns)
        seconds = self._measure(tokens, started)
        self._metrics.batch(len(items), tokens, seconds)
        ends = np.cumsum([turn.stop - turn.start for turn in turns])[:-1]
        for turn, found in zip(turns, np.split(logits, ends), strict=True):
            turn.job.logits[turn.start : turn.stop] = found
            turn.job.flying -= 1
            self._settle(turn.job, time.perf_counter())

    def _measure(self, tokens: int, started: float) -> float:
        """Follow the engine's speed, by the seconds that it had for a slice; tells those.

        A slice that was given to it beside another had it from when that was done.
        """
        now = time.perf_counter()
        seconds = now - max(started, self._free)
        self._free = now
        # Sums, not single speeds: two that are done at once were not each done in no time.
        self._recent = 0.8 * self._recent + np.array([tokens, seconds])
        self._rate = float(self._recent[0] / max(self._recent[1], 1e-6))
        return seconds

    def _hold(self, tokens: int) -> None:
        """Count so many more tokens, or fewer, as waiting."""
        self.queued += tokens
        self._metrics.queue_tokens.set(self.queued)

    def _fail(self, turn: Turn, error: Exception) -> None:
        job = turn.job
        job.flying -= 1
        job.end = job.handed
        if not job.done.done():
            if not isinstance(error, QrankError):
                log.error("%s: the backend failed", self._name, exc_info=error)
                error = QrankError(f"the backend failed: {type(error).__name__}: {error}")
            job.done.set_exception(error)

    def _settle(self, job: Job, now: float) -> None:
        """Let a job go whose items are all scored, or those for which its budget was enough."""
        if job.ends is not None and now >= job.ends:
            job.end = max(job.handed, job.first)
        if not job.waiting and not job.flying and not job.done.done():
            job.done.set_result(None)

    def _outcome(self, job: Job, pairs: int) -> RerankOutcome:
        """What came of a job whose items that were handed to the engine are all back."""
        read = job.items[: job.handed]
        found = ScoredPairs.of(job.items, job.logits[: job.handed], self._engine.scores)
        left = pairs - len(found)
        lowest = int(found.logits.argmin())
        truncated = [False] * pairs
        for item in job.items:
            truncated[item.owner] |= item.truncated
        return RerankOutcome(
            self._name,
            [*found.logits.tolist(), *[float(found.logits[lowest])] * left],
            [*found.scores.tolist(), *[float(found.scores[lowest])] * left],
            truncated,
            [True] * len(found) + [False] * left,
            [*found.order, *range(len(found), pairs)],
            sum(item.tokens for item in read),
            time.perf_counter() - job.arrived,
        )
