"""Cohere's POST /v2/rerank."""

from __future__ import annotations

import uuid
from typing import Any

from pydantic import BaseModel

from qrank.serve.dialect import Dialect
from qrank.serve.dialect_rerank import Meta, RerankRequest, RerankResult, meta, parse, results
from qrank.serve.request import RerankOutcome


class CohereResponse(BaseModel):
    """Cohere's v2 response."""

    id: str
    results: list[RerankResult]
    meta: Meta


def render(body: RerankRequest, outcome: RerankOutcome) -> CohereResponse:
    """The response, in Cohere's v2 format."""
    return CohereResponse(
        id=str(uuid.uuid4()),
        results=results(body, outcome, documents=body.return_documents is True),
        meta=meta("2", outcome),
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in Cohere's format."""
    return status, {"id": str(uuid.uuid4()), "message": message}


COHERE = Dialect(
    name="rerank_v2",
    servers=("Cohere",),
    description="Cohere's.",
    paths=("/v2/rerank",),
    request=RerankRequest,
    answer=CohereResponse,
    parse=parse,
    render=render,
    error=error,
)
