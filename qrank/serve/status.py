"""Routes about the server itself: health, models, limits and metrics."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from qrank.serve.guard import Guard
from qrank.serve.service import Service
from qrank.system.version import __version__


class ModelCard(BaseModel):
    """One of the served models, as OpenAI lists them."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qrank"


class ModelList(BaseModel):
    """The response of OpenAI's GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def add_routes(app: FastAPI, service: Service, guard: Guard) -> None:
    """Add the routes to an application."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 while it accepts requests; 503 while it drains, or after it has failed."""
        status = "failed" if guard.failed else "draining" if guard.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The served models and the limits of requests, in TEI's fields and qrank's."""
        return _info(service)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The names of the served models, in OpenAI's format."""
        return ModelList(data=[ModelCard(id=m, created=service.started) for m in service.names])

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _info(service: Service) -> dict[str, Any]:
    name, first = next(iter(service.models.items()))
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    limits = service.limits
    return {
        "model_id": name,
        "model_sha": first.manifest.source.revision,
        "model_dtype": first.precision,
        "model_type": {"reranker": labels},
        "max_concurrent_requests": None,
        "max_input_length": first.max_length,
        "max_batch_tokens": limits.queue_tokens,
        "max_client_batch_size": limits.documents,
        "auto_truncate": True,
        "version": __version__,
        "models": {
            name: {
                "open": model.engine is not None,
                "target": model.target,
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
