"""The served models, and what becomes of every request whatever its dialect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.requests import Request

from qrank.reranker import Reranker
from qrank.serve.batcher import Batcher
from qrank.serve.guard import Limits
from qrank.serve.metrics import Metrics
from qrank.serve.request import Asked, Outcome, RefusedError


class Service:
    """Models by name, each with a queue."""

    def __init__(self, models: Mapping[str, Reranker], limits: Limits, metrics: Metrics) -> None:
        """Take models.

        Args:
            models: the first is the default.
            limits: of requests.
            metrics: where to count.
        """
        self.models = dict(models)
        self.limits = limits
        self.metrics = metrics
        self.started = int(time.time())
        self._batchers: dict[str, Batcher] = {}

    async def open(self) -> None:
        """Start the queues, on the loop that serves."""
        self._batchers = {
            name: Batcher(name, model, self.metrics, queue_tokens=self.limits.queue_tokens)
            for name, model in self.models.items()
        }

    async def close(self) -> None:
        """Stop them."""
        for batcher in self._batchers.values():
            await batcher.close()

    async def score(self, request: Request, asked: Asked) -> Outcome:
        """Score what is asked, for as long as the client is there.

        Raises:
            RefusedError: see `Batcher.score`; 404 for an unknown model, 413 for too many documents
                or too long a text.
        """
        limits = self.limits
        said = request.state.said = {"pairs": len(asked.pairs)}
        name = next(iter(self.models)) if asked.model is None else asked.model
        if name not in self.models:
            raise RefusedError(404, f"no such model here; there are: {', '.join(self.models)}")
        said["model"] = name
        if len(asked.pairs) > limits.documents:
            raise RefusedError(
                413,
                f"{len(asked.pairs):,} documents; a request may have {limits.documents:,} "
                "(--max-documents)",
            )
        longest = max(max(map(len, pair)) for pair in asked.pairs)
        if longest > limits.characters:
            raise RefusedError(
                413,
                f"a text of {longest:,} characters; one may have {limits.characters:,} "
                "(--max-characters)",
            )
        work = self._batchers[name].score(asked, limits.seconds)
        outcome = await _while_connected(request, work)
        said["tokens"] = outcome.tokens
        return outcome


async def _while_connected(request: Request, work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """Await work, and cancel it where the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusedError(499, "the client hung up")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
