"""The served models, and the scoring of requests of all dialects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from qrank.engine import Engine
from qrank.serve.batcher import Batcher
from qrank.serve.metrics import Metrics
from qrank.serve.request import Limits, RequestError, RerankOutcome, RerankTask


class Service:
    """Models by name, each with a queue."""

    def __init__(
        self,
        models: Mapping[str, Engine],
        limits: Limits,
        metrics: Metrics,
        *,
        aliases: Mapping[str, str] | None = None,
        instructions: Mapping[str, str] | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a service; `open` starts its queues.

        Args:
            models: the first is the default.
            limits: of requests.
            metrics: where to count.
            aliases: other names -> names of models.
            instructions: name of a model -> instruction for requests without one.
            failed: called when a bug has ended a queue.
        """
        self.models = dict(models)
        self.limits = limits
        self.metrics = metrics
        self.started = int(time.time())
        self._names = {name: name for name in self.models} | dict(aliases or {})
        self._instructions = dict(instructions or {})
        self._failed = failed
        self._batchers: dict[str, Batcher] = {}

    @property
    def names(self) -> list[str]:
        """Every name that a request may give."""
        return list(self._names)

    def named(self, name: str | None) -> str:
        """The model that a request's `model` stands for.

        If only one model is served, every name stands for it: clients of hosted services send the
        names of those services' models, or insist on a name.

        Raises:
            RequestError: 404 if several models are served and none has the name.
        """
        if name is None or (name not in self._names and len(self.models) == 1):
            return next(iter(self.models))
        if name not in self._names:
            raise RequestError(404, f"no such model here; there are: {', '.join(self._names)}")
        return self._names[name]

    async def open(self) -> None:
        """Start the queues, on the event loop of the server."""
        self._batchers = {
            name: Batcher(
                name,
                model,
                self.metrics,
                queue_tokens=self.limits.queue_tokens,
                failed=self._failed,
            )
            for name, model in self.models.items()
        }

    async def close(self) -> None:
        """Stop the queues."""
        for batcher in self._batchers.values():
            await batcher.close()

    async def score(self, request: Request, task: RerankTask) -> RerankOutcome:
        """Score a task, as long as the client is connected.

        Raises:
            RequestError: see `Batcher.score`; 404 for an unknown model, 413 for too many documents
                or too long a text.
        """
        limits = self.limits
        said = request.state.said = {"pairs": len(task.pairs)}
        name = said["model"] = self.named(task.model)
        if task.instruction is None:
            task = replace(task, instruction=self._instructions.get(name))
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
        work = self._batchers[name].score(task, limits.seconds)
        outcome = await _while_connected(request, work)
        said["tokens"] = outcome.tokens
        return outcome


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
