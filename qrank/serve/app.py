"""The application: one route for each path of a dialect, and the routes of `status`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from qrank.serve import errors, status
from qrank.serve.dialect import Dialect, Dialects
from qrank.serve.dialect_cohere import COHERE
from qrank.serve.dialect_infinity import INFINITY
from qrank.serve.dialect_librechat import LIBRECHAT
from qrank.serve.dialect_nim import NIM
from qrank.serve.dialect_ollama import OLLAMA
from qrank.serve.dialect_rerank import RERANK
from qrank.serve.dialect_score import SCORE
from qrank.serve.dialect_tei import TEI
from qrank.serve.dialect_voyage import VOYAGE
from qrank.serve.dialect_weaviate import WEAVIATE
from qrank.serve.guard import Guard
from qrank.serve.metrics import Metrics
from qrank.serve.page import add_page
from qrank.serve.request import Limits
from qrank.serve.residence import ServedModel
from qrank.serve.service import Service
from qrank.system.version import __version__

DIALECTS: tuple[Dialect[Any], ...] = (
    TEI,
    RERANK,
    COHERE,
    OLLAMA,
    SCORE,
    NIM,
    VOYAGE,
    WEAVIATE,
    LIBRECHAT,
    INFINITY,
)

ERRORS_ELSEWHERE = {"/v1/models": SCORE.error, "": RERANK.error}
"""Shapes of errors at paths without a dialect; "" stands for all other paths."""


def build(
    models: Iterable[ServedModel],
    *,
    limits: Limits | None = None,
    keys: tuple[bytes, ...] = (),
    root: str = "",
    page: bool = True,
    dialects: Sequence[Dialect[Any]] = DIALECTS,
    **serving: Any,
) -> Guard:
    """Build the application.

    Args:
        models: the first is the default.
        limits: of requests.
        keys: a request must send one of them; no keys: every request is allowed.
        root: the path under which a proxy serves the application, as `/rank`.
        page: serve the page at /.
        dialects: those that the server accepts.
        serving: more arguments of `Service`.
    """
    limits = limits or Limits()
    registry = Dialects(dialects, elsewhere=ERRORS_ELSEWHERE)
    service = Service(
        models,
        limits,
        Metrics(),
        failed=lambda: guard.fail(),
        **serving,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.open()
        yield
        await service.close()

    app = FastAPI(
        title="qrank",
        version=__version__,
        description=f"Reranking in the dialects of {', '.join(registry.servers)}.",
        lifespan=lifespan,
        # A redirect makes clients send body and key again; the guard accepts both forms.
        redirect_slashes=False,
    )
    guard = Guard(
        app, keys=keys, limits=limits, metrics=service.metrics, dialects=registry, root=root
    )
    for path in registry.paths:
        _add_route(app, service, registry, path)
    status.add_routes(app, service, guard)
    if page:
        add_page(app, root)
    errors.add_handlers(app, registry)
    guard.routes = frozenset(path for route in app.routes if (path := getattr(route, "path", "")))
    return guard


def _add_route(app: FastAPI, service: Service, dialects: Dialects, path: str) -> None:
    async def endpoint(request: Request, body: Any) -> Any:
        dialect = dialects.of(path, body)
        request.state.error_shape = dialect.error
        request.state.ignored = sorted(body.model_extra or ())
        outcome = await service.score(request, dialect.parse(body))
        return dialect.render(body, outcome)

    # FastAPI reads the type of the body here.
    endpoint.__annotations__["body"] = dialects.request(path)
    here = dialects.at(path)
    app.post(
        path,
        name=here[0].name,
        description=" ".join(dialect.description for dialect in here),
        response_model=dialects.answer(path),
        response_model_exclude_none=True,
    )(endpoint)
