"""One model's queue: the pairs of all requests, cut into slices that its engine scores.

A slice holds the tokens that the engine reads in about SLICE_SECONDS. Slices alternate: one
is filled from the oldest request on, the next from the request that was served the fewest tokens.
So the oldest request gets at least half of the machine's speed, and a short request waits for only
a few slices, however many documents the others have. Without a budget, a request's longest inputs
come first, so that a slice holds inputs of similar length.

`qrank.scoring.deadline` says what a time budget promises. Here it is kept by means of the engine's
speed, measured on the slices of all requests.

All state belongs to the event loop, so there are no locks. The engine runs in its own threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Logits
from qrank.engine import Engine
from qrank.errors import InputError, QrankError
from qrank.scoring.activation import Scores
from qrank.scoring.inputs import ModelInput, stops_by_size
from qrank.scoring.ranking import ScoredPairs
from qrank.serve.metrics import Metrics
from qrank.serve.request import RequestError, RerankOutcome, RerankTask
from qrank.serve.score_cache import ScoreCache
from qrank.serve.slices import Job, Share, next_slice

log = logging.getLogger("qrank.serve")

SLICE_SECONDS = 0.05
"""Target time of a slice: most of a short request's wait, and the granularity of a budget."""

ALONE = 2
"""A request that is alone gets slices this many times as long, and up to twice that if it ends so:
batches are fuller, and nobody waits."""

SLICE_TOKENS = 65_536
"""Maximum tokens of a slice, however fast the engine is."""

IN_FLIGHT = 2
"""Slices given to the engine at a time: the second uses what the first leaves idle."""

ENCODERS = 2
"""Tokenizer threads, besides those of the engine; one more serves only short requests."""

STEP_CHARACTERS = 100_000
"""Characters tokenized at a time, so that requests take turns and can be cancelled."""


class Batcher:
    """Scores requests with one engine. Made and used on one event loop."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        metrics: Metrics,
        *,
        queue_tokens: int,
        raw: bool = False,
        cache: ScoreCache | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the queue.

        Args:
            name: of the model, for messages and metrics.
            engine: scores the pairs.
            metrics: where to count.
            queue_tokens: how many may wait; a request beyond that is refused, unless the queue
                is empty.
            raw: return logits as scores.
            cache: of the server; None: every pair is scored.
            failed: called when a bug ends the queue, which then serves nothing more.
        """
        self._engine = engine
        self._scores = _as_they_are if raw else engine.scores
        self._known = None if cache is None else cache.of(engine)
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
        self._idle_since = 0.0
        self._recent = np.zeros(2)
        self._engine_threads = ThreadPoolExecutor(IN_FLIGHT, f"qrank-engine-{name}")
        self._encoders = ThreadPoolExecutor(ENCODERS, f"qrank-encode-{name}")
        self._quick_encoder = ThreadPoolExecutor(1, f"qrank-encode-short-{name}")
        self._feeders = [asyncio.create_task(self._feed()) for _ in range(IN_FLIGHT)]
        for feeder in self._feeders:
            feeder.add_done_callback(self._feeder_ended)

    async def close(self) -> None:
        """Stop; waiting requests are cancelled."""
        for feeder in self._feeders:
            feeder.cancel()
        await asyncio.gather(*self._feeders, return_exceptions=True)
        for job in self._jobs:
            job.done.cancel()
        for threads in (self._engine_threads, self._encoders, self._quick_encoder):
            # Not on the event loop: a call of a cancelled request may still run.
            await asyncio.to_thread(threads.shutdown)

    async def score(
        self, task: RerankTask, timeout: float, arrived: float | None = None
    ) -> RerankOutcome:
        """Score a request's pairs, interleaved with those of other requests.

        Cancelling it takes the request out of the queue.

        Args:
            task: what to score.
            timeout: seconds it may take in total.
            arrived: when it came, by `time.perf_counter`; None: now.

        Raises:
            RequestError: 413 if a pair does not fit and may not be cut, 422 if the model does not
                take the input, 429 if too many tokens wait, 500 if the engine fails, 503 if the
                time is up or the queue has failed.
        """
        arrived = time.perf_counter() if arrived is None else arrived
        self._refuse_if_broken()
        guess = task.estimate_tokens(self._engine.max_length)
        if self.queued and self.queued + guess > self._limit:
            self._metrics.dropped["overflow"].inc()
            raise RequestError(
                429,
                f"{self.queued:,} tokens wait for {self._name}, and about {guess:,} more would be "
                f"beyond its limit of {self._limit:,}; try again later",
                retry_after=min(max(math.ceil(self.queued / max(self._rate, 1)), 1), 600),
            )
        counted = guess
        self._count_queued(counted)
        self._metrics.queue_requests.inc()
        try:
            async with asyncio.timeout(timeout - (time.perf_counter() - arrived)):
                deadline = None if task.budget is None else arrived + task.budget
                inputs = await self._encode(task, deadline)
                logits = self._recall(inputs)
                missing = np.flatnonzero(np.isnan(logits))
                if deadline is None:
                    missing = missing[_longest_first([inputs[i] for i in missing])]
                job = Job(
                    [inputs[i] for i in missing],
                    arrived,
                    deadline,
                    asyncio.get_running_loop().create_future(),
                )
                self._count_queued(job.tokens - counted)
                counted = job.tokens
                if job.inputs:
                    await self._finish(job)
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
            self._count_queued(-counted)
            self._metrics.queue_requests.dec()
        scored = missing[: job.dispatched]
        logits[scored] = job.logits[: job.dispatched]
        # Without time for all: the first ones, although some later ones may be known.
        stop = len(inputs) if len(scored) == len(missing) else int(missing[len(scored)])
        found = ScoredPairs.of(inputs, logits[:stop], self._scores)
        return RerankOutcome.of(
            self._name,
            len(task.pairs),
            inputs,
            found,
            tokens=sum(each.tokens for each in job.inputs[: job.dispatched]),
            seconds=time.perf_counter() - arrived,
            cached=self._remember(job, found),
        )

    async def _finish(self, job: Job) -> None:
        """Put a job into the queue until it is done."""
        self._refuse_if_broken()
        self._jobs.append(job)
        self._wake.set()
        try:
            await job.done
        finally:
            self._jobs.remove(job)

    def _recall(self, inputs: list[ModelInput]) -> Logits:
        """The logits in the cache; NaN for those that must be scored. Shape [n]."""
        if self._known is None:
            return np.full(len(inputs), np.nan, np.float32)
        return self._known.recall(inputs)

    def _remember(self, job: Job, found: ScoredPairs) -> int | None:
        """Store the logits of a job; return how many of the scored pairs came from the cache."""
        if self._known is None:
            return None
        self._known.remember(job.inputs[: job.dispatched], job.logits[: job.dispatched])
        read = {each.owner for each in job.inputs}
        cached = sum(each.owner not in read for each in found.best)
        self._metrics.cache_hits.inc(cached)
        self._metrics.cache_misses.inc(len(found) - cached)
        return cached

    async def _encode(self, task: RerankTask, deadline: float | None) -> list[ModelInput]:
        """A request's inputs; only the first ones if its budget is used up meanwhile.

        Long requests take turns; short ones have their own thread.
        """
        steps = self._engine.preparing(
            task.pairs,
            stops_by_size([len(document) for _, document in task.pairs], STEP_CHARACTERS),
            task.instruction,
            task.long_documents or "truncate",
            task.document_tokens,
        )
        short = sum(map(len, {text for pair in task.pairs for text in pair})) <= STEP_CHARACTERS
        threads = self._quick_encoder if short else self._encoders
        loop = asyncio.get_running_loop()
        inputs: list[ModelInput] = []
        while some := await loop.run_in_executor(threads, next, steps, None):
            inputs += some
            if deadline is not None and time.perf_counter() >= deadline:
                break
        long = next((each.owner for each in inputs if each.truncated), None)
        if task.whole and long is not None:
            raise RequestError(
                413, f"text {long} does not fit the model with the query; ask for truncate"
            )
        return inputs

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise RequestError(
                503, f"the queue of {self._name} has failed, and the server ends; its log says why"
            )

    def _feeder_ended(self, feeder: asyncio.Task[None]) -> None:
        """Fail all waiting requests if a feeder was not cancelled: only a bug ends it."""
        if feeder.cancelled() or self._broken:
            return
        self._broken = True
        log.critical("%s: the queue failed", self._name, exc_info=feeder.exception())
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(QrankError("the server failed; its log says why"))
        self._failed()

    async def _feed(self) -> None:
        """Give slices to the engine, one after the other."""
        while True:
            now = time.perf_counter()
            for job in self._jobs:
                self._finish_if_done(job, now)
            waiting = [job for job in self._jobs if job.waiting]
            if self._least_first:
                waiting.sort(key=lambda job: job.tokens_served)
            tokens = self._slice_tokens(waiting)
            shares = next_slice(waiting, tokens, self._engine.threads, now, self._rate)
            if not shares:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._least_first = not self._least_first
            for share in shares:
                share.job.in_flight += 1
            await self._run(shares)

    def _slice_tokens(self, waiting: list[Job]) -> float:
        """Maximum tokens of the next slice."""
        tokens = self._rate * SLICE_SECONDS
        if len(waiting) == 1:
            tokens *= ALONE
            if waiting[0].tokens - waiting[0].tokens_served <= 2 * tokens:
                tokens *= 2
        return min(tokens, SLICE_TOKENS)

    async def _run(self, shares: list[Share]) -> None:
        """Score a slice; if that fails, score each share separately, so that only one fails."""
        inputs = [each for share in shares for each in share.inputs]
        started = time.perf_counter()
        for share in shares:
            if share.start == 0:
                self._metrics.wait.observe(started - share.job.arrived)
        try:
            logits = await asyncio.get_running_loop().run_in_executor(
                self._engine_threads, self._engine.logits, inputs
            )
        except Exception as error:  # a backend may raise anything
            if len(shares) > 1:
                log.warning("%s: a batch failed, so its requests run one by one", self._name)
                for share in shares:
                    if not share.job.done.done():
                        await self._run([share])
                return
            self._fail(shares[0], error)
            return
        tokens = sum(share.tokens for share in shares)
        seconds = self._measure(tokens, started)
        self._metrics.batch(len(inputs), tokens, seconds)
        ends = np.cumsum([share.stop - share.start for share in shares])[:-1]
        for share, found in zip(shares, np.split(logits, ends), strict=True):
            share.job.logits[share.start : share.stop] = found
            share.job.in_flight -= 1
            self._finish_if_done(share.job, time.perf_counter())

    def _measure(self, tokens: int, started: float) -> float:
        """Update the engine's speed with a slice, and return the seconds the slice took.

        If two slices overlap, the time of the second counts from the end of the first.
        """
        now = time.perf_counter()
        seconds = now - max(started, self._idle_since)
        self._idle_since = now
        # Sums, not speeds: of two slices that end together, the second seems to take no time.
        self._recent = 0.8 * self._recent + np.array([tokens, seconds])
        self._rate = float(self._recent[0] / max(self._recent[1], 1e-6))
        return seconds

    def _count_queued(self, tokens: int) -> None:
        """Add to the number of waiting tokens; a negative number subtracts."""
        self.queued += tokens
        self._metrics.queue_tokens.set(self.queued)

    def _fail(self, share: Share, error: Exception) -> None:
        job = share.job
        job.in_flight -= 1
        job.stop = job.dispatched
        if not job.done.done():
            if not isinstance(error, QrankError):
                log.error("%s: the backend failed", self._name, exc_info=error)
                error = QrankError(f"the backend failed: {type(error).__name__}: {error}")
            job.done.set_exception(error)

    def _finish_if_done(self, job: Job, now: float) -> None:
        """Finish a job if all its inputs, or all that fit its budget, are scored."""
        if job.deadline is not None and now >= job.deadline:
            job.stop = max(job.dispatched, job.first)
        if not job.waiting and not job.in_flight and not job.done.done():
            job.done.set_result(None)


def _longest_first(inputs: Sequence[ModelInput]) -> NDArray[np.intp]:
    """The order of inputs in which neighbours need the least padding."""
    return np.argsort([-len(each.ids) for each in inputs], kind="stable")


def _as_they_are(logits: Logits) -> Scores:
    return logits.astype(np.float64)
