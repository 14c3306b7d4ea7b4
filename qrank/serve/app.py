"""The routes: a request of some dialect in, that dialect's answer or error out."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Discriminator, Tag
from starlette.exceptions import HTTPException

from qrank.engine import Engine
from qrank.serve import dialects
from qrank.serve.guard import Guard, refuse
from qrank.serve.metrics import Metrics
from qrank.serve.request import Limits, RequestError
from qrank.serve.schemas import (
    CohereResponse,
    ModelCard,
    ModelList,
    OllamaResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
    TeiRank,
    TeiRequest,
)
from qrank.serve.service import Service
from qrank.serve.validation import reasons, tag
from qrank.system.version import __version__

log = logging.getLogger("qrank.serve")


def _dialect(body: object) -> str:
    return tag("texts" if isinstance(body, Mapping) and "texts" in body else "documents")


TeiOrRerank = Annotated[
    Annotated[TeiRequest, Tag(tag("texts"))] | Annotated[RerankRequest, Tag(tag("documents"))],
    Discriminator(_dialect),
]


def build(
    models: Mapping[str, Engine],
    *,
    limits: Limits | None = None,
    keys: tuple[bytes, ...] = (),
    aliases: Mapping[str, str] | None = None,
    instructions: Mapping[str, str] | None = None,
    root: str = "",
) -> Guard:
    """The whole application.

    Args:
        models: by name, the first the default.
        limits: of requests.
        keys: one of which a request must have; none: no key is needed.
        aliases: other names -> names of models.
        instructions: name of a model -> instruction of requests that bring none.
        root: the prefix under which a proxy offers it, as `/rank`.
    """
    limits = limits or Limits()
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

    app = FastAPI(
        title="qrank",
        version=__version__,
        description="Reranking in the dialects of TEI, Jina, Cohere, vLLM, llama.cpp and Ollama.",
        lifespan=lifespan,
        # A client would have to send its body and key again; the guard knows both forms.
        redirect_slashes=False,
    )
    guard = Guard(app, keys=keys, limits=limits, metrics=service.metrics, root=root)
    _add_reranking(app, service)
    _add_state(app, service, guard)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    guard.routes = frozenset(path for route in app.routes if (path := getattr(route, "path", "")))
    return guard


def _add_reranking(app: FastAPI, service: Service) -> None:
    post = partial(app.post, response_model_exclude_none=True)

    @post("/rerank")
    async def rerank(request: Request, body: TeiOrRerank) -> list[TeiRank] | RerankResponse:
        """TEI's with `texts`; as /v1/rerank with `documents`."""
        if isinstance(body, RerankRequest):
            request.state.path = "/v1/rerank"
            return await rerank_v1(request, body)
        outcome = await service.score(request, dialects.asked_tei(body))
        return dialects.answer_tei(body, outcome)

    @post("/v1/rerank")
    async def rerank_v1(request: Request, body: RerankRequest) -> RerankResponse:
        """Jina's, llama.cpp's, vLLM's and Cohere's v1."""
        outcome = await service.score(request, dialects.asked_rerank(body))
        return dialects.answer_rerank(body, outcome)

    @post("/v2/rerank")
    async def rerank_v2(request: Request, body: RerankRequest) -> CohereResponse:
        """Cohere's."""
        outcome = await service.score(request, dialects.asked_rerank(body))
        return dialects.answer_cohere(body, outcome)

    @post("/api/rerank")
    async def rerank_ollama(request: Request, body: RerankRequest) -> OllamaResponse:
        """Ollama's, as proposed."""
        outcome = await service.score(request, dialects.asked_rerank(body))
        return dialects.answer_ollama(body, outcome)

    @post("/v1/score")
    @post("/score")
    async def score(request: Request, body: ScoreRequest) -> ScoreResponse:
        """VLLM's: pairs, in the order they are sent."""
        outcome = await service.score(request, dialects.asked_score(body))
        return dialects.answer_score(body, outcome)


def _add_state(app: FastAPI, service: Service, guard: Guard) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether to send requests here: 503 while it drains, or once it has failed."""
        status = "failed" if guard.failed else "draining" if guard.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What is served and what a request may be: TEI's fields, and ours."""
        return _info(service)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """OpenAI's list."""
        return ModelList(data=[ModelCard(id=m, created=service.started) for m in service.names])

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _info(service: Service) -> dict[str, Any]:
    name, first = next(iter(service.models.items()))
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    limits = service.limits
    return {
        "model_id": name,
        "model_sha": first.manifest.source.revision,
        "model_dtype": first.target.variant.precision,
        "model_type": {"reranker": labels},
        "max_concurrent_requests": None,
        "max_input_length": first.max_length,
        "max_batch_tokens": limits.queue_tokens,
        "max_client_batch_size": limits.documents,
        "auto_truncate": True,
        "version": __version__,
        "models": {
            name: {
                "target": model.target.name,
                "family": model.manifest.family.name,
                "max_input_length": model.max_length,
                "source": model.manifest.source.id,
                "digest": model.manifest.digest,
            }
            for name, model in service.models.items()
        },
        "limits": {
            "max_documents": limits.documents,
            "max_characters": limits.characters,
            "max_body": limits.body,
            "queue_tokens": limits.queue_tokens,
            "request_timeout": limits.seconds,
        },
    }


def _path(request: Request) -> str:
    return str(request.state.path)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refuse(_path(request), error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    path, found = _path(request), error.errors()
    if found[0]["type"] == "json_invalid":
        reason, place = found[0]["ctx"]["error"], found[0]["loc"][-1]
        refusal = RequestError(400, f"the body is no JSON: {reason}, at character {place}")
    elif isinstance(error.body, bytes):
        refusal = RequestError(422, "send JSON, with content-type: application/json")
    else:
        if path == "/rerank" and tag("documents") in found[0]["loc"]:
            path = "/v1/rerank"
        refusal = RequestError(422, reasons(found))
    return refuse(path, refusal)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = _unreadable(error.__cause__) or str(error.detail)
    response = refuse(_path(request), RequestError(error.status_code, said))
    response.headers.update(error.headers or {})
    return response


def _unreadable(error: BaseException | None) -> str | None:
    """Why a body could not be parsed, where that was the reason of an HTTPException."""
    match error:
        case UnicodeDecodeError():
            return f"the body is no UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        case RecursionError():
            return "the body is nested too deeply"
        case ValueError():
            return "the body holds a number with too many digits"
    return None


async def _failed(request: Request, error: Exception) -> Response:
    return refuse(
        _path(request), RequestError(500, "the server made a mistake; its log says which")
    )
