"""The application: a route for each path of a dialect, its requests in, its answers out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from qrank.reranker import Reranker
from qrank.serve import errors, status
from qrank.serve.dialect import Dialect, Dialects
from qrank.serve.dialect_cohere import COHERE
from qrank.serve.dialect_ollama import OLLAMA
from qrank.serve.dialect_rerank import RERANK
from qrank.serve.dialect_score import SCORE
from qrank.serve.dialect_tei import TEI
from qrank.serve.guard import Guard
from qrank.serve.metrics import Metrics
from qrank.serve.request import Limits
from qrank.serve.service import Service
from qrank.system.version import __version__

DIALECTS: tuple[Dialect[Any], ...] = (TEI, RERANK, COHERE, OLLAMA, SCORE)

ERRORS_ELSEWHERE = {"/v1/models": SCORE.error, "": RERANK.error}
"""Shapes of errors at paths of no dialect; "": at all others."""


def build(
    models: Mapping[str, Reranker],
    *,
    limits: Limits | None = None,
    keys: tuple[bytes, ...] = (),
    aliases: Mapping[str, str] | None = None,
    instructions: Mapping[str, str] | None = None,
    root: str = "",
    dialects: Sequence[Dialect[Any]] = DIALECTS,
) -> Guard:
    """The whole application.

    Args:
        models: by name, the first the default.
        limits: of requests.
        keys: one of which a request must have; none: no key is needed.
        aliases: other names -> names of models.
        instructions: name of a model -> instruction of requests that bring none.
        root: the prefix under which a proxy offers it, as `/rank`.
        dialects: what is spoken.
    """
    limits = limits or Limits()
    spoken = Dialects(dialects, elsewhere=ERRORS_ELSEWHERE)
    service = Service(
        models,
        limits,
        Metrics(),
        aliases=aliases,
        instructions=instructions,
        failed=lambda: guard.fail(),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.open()
        yield
        await service.close()

    *most, last = spoken.servers
    app = FastAPI(
        title="qrank",
        version=__version__,
        description=f"Reranking in the dialects of {', '.join(most)} and {last}.",
        lifespan=lifespan,
        # A client would have to send its body and key again; the guard knows both forms.
        redirect_slashes=False,
    )
    guard = Guard(
        app, keys=keys, limits=limits, metrics=service.metrics, dialects=spoken, root=root
    )
    for path in spoken.paths:
        _add_route(app, service, spoken, path)
    status.add_routes(app, service, guard)
    errors.add_handlers(app, spoken)
    guard.routes = frozenset(path for route in app.routes if (path := getattr(route, "path", "")))
    return guard


def _add_route(app: FastAPI, service: Service, dialects: Dialects, path: str) -> None:
    async def endpoint(request: Request, body: Any) -> Any:
        dialect = dialects.of(path, body)
        request.state.error_shape = dialect.error
        outcome = await service.score(request, dialect.parse(body))
        return dialect.render(body, outcome)

    # FastAPI validates and describes the body by this.
    endpoint.__annotations__["body"] = dialects.request(path)
    spoken = dialects.at(path)
    app.post(
        path,
        name=spoken[0].name,
        description=" ".join(dialect.description for dialect in spoken),
        response_model=dialects.answer(path),
        response_model_exclude_none=True,
    )(endpoint)
