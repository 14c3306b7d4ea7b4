"""Voyage's POST /v1/rerank: `top_k` in the request, `data` in the response."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from qrank.serve.dialect import Dialect
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.schemas import Count, Extended, Text, TextList


class VoyageRequest(Extended):
    """A request of Voyage's rerankers."""

    query: Text
    documents: TextList
    top_k: Count | None = Field(None, description="Return only so many; 0 and null: all.")
    return_documents: bool | None = False
    truncation: bool | None = Field(
        True, description="false: refuse a pair that does not fit. Default: cut it."
    )


class VoyageResult(BaseModel):
    """One document of the sorted list."""

    index: int
    relevance_score: float
    document: str | None = None


class VoyageUsage(BaseModel):
    """Tokens the model read."""

    total_tokens: int


class VoyageResponse(BaseModel):
    """Voyage's response."""

    object: Literal["list"] = "list"
    data: list[VoyageResult]
    model: str
    usage: VoyageUsage


def parse(body: VoyageRequest) -> RerankTask:
    """The task of a request."""
    pairs = [(body.query, document) for document in body.documents]
    return body.task(pairs, whole=body.truncation is False)


def render(body: VoyageRequest, outcome: RerankOutcome) -> VoyageResponse:
    """The response, best first."""
    return VoyageResponse(
        data=[
            VoyageResult(
                index=i,
                relevance_score=outcome.scores[i],
                document=body.documents[i] if body.return_documents else None,
            )
            for i in outcome.order[: body.top_k or None]
        ],
        model=outcome.model,
        usage=VoyageUsage(total_tokens=outcome.tokens),
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in Voyage's format."""
    return status, {"detail": message}


VOYAGE = Dialect(
    name="rerank_voyage",
    servers=("Voyage",),
    description="Voyage's, with `top_k`.",
    paths=("/v1/rerank",),
    field="top_k",
    request=VoyageRequest,
    answer=VoyageResponse,
    parse=parse,
    render=render,
    error=error,
)
