"""The served models, and the scoring of requests of all dialects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from qrank.engine import Engine
from qrank.serve.batcher import Batcher
from qrank.serve.metrics import Metrics
from qrank.serve.request import Defaults, Limits, RequestError, RerankOutcome, RerankTask
from qrank.serve.residence import Residence, ServedModel
from qrank.serve.score_cache import ScoreCache


class Service:
    """Models by name, each with a queue while it is open."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        limits: Limits,
        metrics: Metrics,
        *,
        aliases: Mapping[str, str] | None = None,
        strict_models: bool = False,
        defaults: Defaults | None = None,
        max_memory: int | None = None,
        idle_seconds: float | None = None,
        cached_scores: int = 0,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a service; `open` starts its queues.

        Args:
            models: the first is the default.
            limits: of requests.
            metrics: where to count.
            aliases: other names -> names of models.
            strict_models: refuse unknown names, instead of taking the default model.
            defaults: for requests that do not say.
            max_memory: see `Residence`.
            idle_seconds: see `Residence`.
            cached_scores: size of the `ScoreCache`; 0: there is none.
            failed: called when a bug has ended a queue.
        """
        self.models = {model.name: model for model in models}
        self.limits = limits
        self.metrics = metrics
        self.started = int(time.time())
        self._names = {name: name for name in self.models} | dict(aliases or {})
        self._strict = strict_models
        self._defaults = defaults or Defaults()
        self._cache = ScoreCache(cached_scores) if cached_scores else None
        self._failed = failed
        self._residence = Residence(
            self.models.values(),
            metrics,
            self._start,
            max_memory=max_memory,
            idle_seconds=idle_seconds,
        )

    def _start(self, name: str, engine: Engine) -> Batcher:
        return Batcher(
            name,
            engine,
            self.metrics,
            queue_tokens=self.limits.queue_tokens,
            raw=self._defaults.raw,
            cache=self._cache,
            failed=self._failed,
        )

    @property
    def names(self) -> list[str]:
        """Every name that a request may give."""
        return list(self._names)

    def named(self, name: str | None) -> str:
        """The model that a request's `model` stands for.

        Clients of hosted services send the names of those services' models, or insist on a name:
        an unknown one stands for the default model, unless the server is strict.

        Raises:
            RequestError: 404 for an unknown name, if the server is strict.
        """
        if name in self._names:
            return self._names[name]
        if self._strict and name is not None:
            raise RequestError(404, f"no such model here; there are: {', '.join(self._names)}")
        return next(iter(self.models))

    async def open(self) -> None:
        """Start the queues of the models that are open, on the event loop of the server."""
        await self._residence.open()

    async def close(self) -> None:
        """Stop the queues."""
        await self._residence.close()

    async def score(self, request: Request, task: RerankTask) -> RerankOutcome:
        """Score a task, as long as the client is connected.

        Raises:
            RequestError: see `Batcher.score`; 404 for an unknown model, 413 for too many documents
                or too long a text, 503 if the model cannot be opened.
        """
        arrived = time.perf_counter()
        limits = self.limits
        said = request.state.said = {"pairs": len(task.pairs)}
        name = said["model"] = self.named(task.model)
        task = self._completed(task, name)
        if len(task.pairs) > limits.documents:
            raise RequestError(
                413,
                f"{len(task.pairs):,} documents; a request may have {limits.documents:,} "
                "(--max-documents)",
            )
        longest = max(max(map(len, pair)) for pair in task.pairs)
        if longest > limits.characters:
            raise RequestError(
                413,
                f"a text of {longest:,} characters; one may have {limits.characters:,} "
                "(--max-characters)",
            )
        outcome = await _while_connected(request, self._scored(name, task, arrived))
        said["tokens"] = outcome.tokens
        if outcome.cached is not None:
            said["cached"] = outcome.cached
        return outcome

    async def _scored(self, name: str, task: RerankTask, arrived: float) -> RerankOutcome:
        seconds = self.limits.seconds
        async with self._residence.using(name, seconds) as batcher:
            return await batcher.score(task, seconds, arrived)

    def _completed(self, task: RerankTask, name: str) -> RerankTask:
        """A task for a model, with the server's defaults."""
        defaults = self._defaults
        return replace(
            task,
            instruction=defaults.instructions.get(name)
            if task.instruction is None
            else task.instruction,
            long_documents=task.long_documents or defaults.long_documents,
            budget=defaults.budget if task.budget is None else task.budget,
        )


async def _while_connected(
    request: Request, work: Coroutine[Any, Any, RerankOutcome]
) -> RerankOutcome:
    """Await work, and cancel it if the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "the client hung up")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
