"""Which of the served models are open: opened when a request needs them, closed to free memory.

All state belongs to the event loop, so there are no locks around it. Models are opened and closed
on threads.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from qrank.bundle.manifest import Manifest
from qrank.engine import Engine
from qrank.errors import InputError
from qrank.serve.batcher import Batcher
from qrank.serve.metrics import Metrics
from qrank.serve.request import RequestError

log = logging.getLogger("qrank.serve")


class ServedModel:
    """A model that the server opens and closes.

    Attributes:
        name: in requests, metrics and the log.
        manifest: its bundle's.
        engine: the model; None while it is closed.
        target: name of the target that runs, or ran last; None before the first opening.
        precision: of that target's variant.
        max_length: maximum tokens of a pair.
        memory: bytes that it may take while it is open, batches included. Only compared with the
            residence's limit.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        opener: Callable[[], Engine],
        *,
        max_length: int | None = None,
        memory: int = 0,
    ) -> None:
        """Describe a model that is closed.

        Args:
            name: see the class.
            manifest: see the class.
            opener: opens it, on any thread.
            max_length: as for `Reranker`.
            memory: see the class.
        """
        self.name = name
        self.manifest = manifest
        self.max_length = max_length or manifest.family.max_length
        self.memory = memory
        self.engine: Engine | None = None
        self.target: str | None = None
        self.precision: str | None = None
        self._opener = opener

    @classmethod
    def of(cls, name: str, engine: Engine) -> ServedModel:
        """A model that is open already, and that is never opened in another way."""
        model = cls(name, engine.manifest, lambda: engine)
        model.take(engine)
        return model

    def open(self) -> None:
        """Open it; blocks. Raises what its opener raises."""
        self.take(self._opener())

    def take(self, engine: Engine) -> None:
        """Take an engine that is open."""
        self.engine = engine
        self.target = engine.target.name
        self.precision = engine.target.variant.precision
        self.max_length = engine.max_length

    def close(self) -> None:
        """Close it, if it is open; blocks."""
        if self.engine is not None:
            try:
                self.engine.close()
            finally:
                self.engine = None
                _give_back()


def _give_back() -> None:
    """Return freed memory to the system: collect reference cycles, and trim glibc's heaps."""
    gc.collect()
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:  # another C library has no such function
        trim(0)


def batch_memory(limit: int, sizes: Sequence[int]) -> int:
    """Bytes for the batches of each of several models that share a limit on their memory.

    An equal part of what the files of all models leave; or, if that is less, a quarter of what
    the largest leaves, and then not all models can be open at a time.

    Args:
        limit: bytes for the files and the batches of the models that are open.
        sizes: bytes of each model's files.

    Raises:
        InputError: the largest model does not fit.
    """
    largest = max(sizes)
    if largest >= limit:
        raise InputError(
            f"the files of one model take {largest / 1e6:,.0f} MB, and --max-memory is "
            f"{limit / 1e6:,.0f} MB for all of them"
        )
    return max((limit - sum(sizes)) // len(sizes), (limit - largest) // 4)


class _Place:
    """A model's state in the residence.

    Attributes:
        model: the model.
        batcher: its queue; None while it is closed.
        change: opens or closes it at the moment.
        waiting: requests that wait until it is open.
        users: number of requests that use the queue.
        unused: set when no request uses the queue any more.
        used: time of the last use, by the loop's clock.
        timer: closes it when it is idle.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.batcher: Batcher | None = None
        self.change: asyncio.Task[None] | None = None
        self.waiting: list[asyncio.Future[Batcher]] = []
        self.users = 0
        self.unused = asyncio.Event()
        self.used = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def waiters(self) -> list[asyncio.Future[Batcher]]:
        """Take those that still wait."""
        found = [each for each in self.waiting if not each.done()]
        self.waiting.clear()
        return found


class Residence:
    """The served models, of which some are open. Used on one event loop."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        metrics: Metrics,
        start: Callable[[str, Engine], Batcher],
        *,
        max_memory: int | None = None,
        idle_seconds: float | None = None,
    ) -> None:
        """Take the models, open or closed; `open` starts the queues of those that are open.

        Args:
            models: their owner closes those that are open in the end.
            metrics: where to count.
            start: starts the queue of a model, given its name, when it was opened.
            max_memory: what the open models' `memory` may add up to; no model's is more. None:
                unlimited.
            idle_seconds: a model without a request for so long is closed. None: never.
        """
        self._places = {model.name: _Place(model) for model in models}
        self._metrics = metrics
        self._start = start
        self._limit = max_memory
        self._idle_seconds = idle_seconds
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Start the queues of the models that are open, on the event loop of the server."""
        for place in self._places.values():
            if place.model.engine is not None:
                self._settle(place, place.model.engine)

    async def close(self) -> None:
        """Stop the queues; requests that still wait are cancelled."""
        for place in self._places.values():
            if place.change is not None:
                await asyncio.wait({place.change})
            await self._stop(place)

    @asynccontextmanager
    async def using(self, name: str, seconds: float) -> AsyncIterator[Batcher]:
        """A model's queue. The model is opened if it is closed, and stays open in the block.

        Args:
            name: of the model.
            seconds: maximum time to wait for it.

        Raises:
            RequestError: 503 if it cannot be opened, or not in time. The next request tries again.
        """
        place = self._places[name]
        try:
            async with asyncio.timeout(seconds):
                batcher = await self._enter(place)
        except TimeoutError:
            raise RequestError(503, f"{name} was not open in time; try again later") from None
        try:
            yield batcher
        finally:
            self._leave(place)

    async def _enter(self, place: _Place) -> Batcher:
        """Count a request that uses a model, as soon as it is open."""
        if place.batcher is not None and place.change is None:
            place.users += 1
            return place.batcher
        waiter: asyncio.Future[Batcher] = asyncio.get_running_loop().create_future()
        place.waiting.append(waiter)
        if place.change is None:
            self._begin(place, self._open(place))
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._leave(place)  # it was counted in the same moment
            raise

    def _leave(self, place: _Place) -> None:
        """Note that a request no longer uses a model."""
        place.users -= 1
        self._touch(place)

    def _touch(self, place: _Place) -> None:
        loop = asyncio.get_running_loop()
        place.used = loop.time()
        if place.users:
            return
        place.unused.set()
        if self._idle_seconds is not None:
            if place.timer is not None:
                place.timer.cancel()
            place.timer = loop.call_later(self._idle_seconds, self._idle, place)

    def _idle(self, place: _Place) -> None:
        if place.batcher is None or place.change is not None or place.users:
            return  # `_touch` comes again
        self._begin(place, self._close(place, "idle"))

    def _begin(self, place: _Place, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Open or close a model, in a task that no request's end cancels."""

        async def changing() -> None:
            try:
                await work
            finally:
                place.change = None
            if place.batcher is None and any(not waiter.done() for waiter in place.waiting):
                self._begin(place, self._open(place))

        place.change = asyncio.create_task(changing())
        return place.change

    async def _open(self, place: _Place) -> None:
        """Open a model, once there is room for it; tell the requests that wait for it."""
        model = place.model
        async with self._opening:  # one at a time, so that memory is counted right
            while self._limit is not None and self._taken() + model.memory > self._limit:
                await self._make_room()
            try:
                await asyncio.to_thread(model.open)
            except Exception as error:  # a backend may raise anything
                log.error("%s cannot be opened: %s", model.name, error)
                for waiter in place.waiters():
                    waiter.set_exception(
                        RequestError(503, f"{model.name} cannot be opened: {error}")
                    )
                return
            assert model.engine is not None
            self._settle(place, model.engine)

    def _settle(self, place: _Place, engine: Engine) -> None:
        """Start the queue of a model that was opened."""
        place.batcher = self._start(place.model.name, engine)
        self._metrics.opened(place.model.name)
        # Counted at once: the next opening must not close the model before they have their turn.
        for waiter in place.waiters():
            place.users += 1
            waiter.set_result(place.batcher)
        self._touch(place)

    async def _make_room(self) -> None:
        """Close the model that was used least recently: an idle one, or else once it is idle.

        Requests that come for it meanwhile wait until it can be opened again, or a stream of them
        would keep it open for ever.
        """
        found = [place for place in self._places.values() if place.model.engine is not None]
        place = min(found, key=lambda each: (each.change is None, each.users > 0, each.used))
        await asyncio.shield(place.change or self._begin(place, self._close(place, "memory")))

    def _taken(self) -> int:
        """Bytes that the open models may take; a model counts until its closing has ended."""
        models = (place.model for place in self._places.values())
        return sum(model.memory for model in models if model.engine is not None)

    async def _close(self, place: _Place, reason: str) -> None:
        """Close a model as soon as no request uses it."""
        while place.users:
            place.unused.clear()
            await place.unused.wait()
        await self._stop(place)
        try:
            await asyncio.to_thread(place.model.close)
        except Exception:  # a backend may raise anything
            log.exception("%s was closed with an error", place.model.name)
        self._metrics.closed(place.model.name, place.model.target or "", reason)

    async def _stop(self, place: _Place) -> None:
        """Stop a model's queue, if it has one."""
        if place.timer is not None:
            place.timer.cancel()
        batcher, place.batcher = place.batcher, None
        if batcher is not None:
            await batcher.close()
