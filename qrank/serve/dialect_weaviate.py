"""The inference server of Weaviate's module reranker-transformers: POST /rerank with `property`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from qrank.serve.dialect import Dialect
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.schemas import Extended, Text, TextList


class WeaviateRequest(Extended):
    """A request of Weaviate."""

    query: Text
    documents: TextList
    property: str | None = None


class WeaviateScore(BaseModel):
    """One document."""

    document: str
    score: float


class WeaviateResponse(BaseModel):
    """The response: Weaviate takes scores by their position, so they are not sorted."""

    query: str
    scores: list[WeaviateScore]
    property: str


def parse(body: WeaviateRequest) -> RerankTask:
    """The task of a request."""
    return body.task([(body.query, document) for document in body.documents])


def render(body: WeaviateRequest, outcome: RerankOutcome) -> WeaviateResponse:
    """The response, in the order of the request."""
    return WeaviateResponse(
        query=body.query,
        scores=[
            WeaviateScore(document=document, score=score)
            for document, score in zip(body.documents, outcome.scores, strict=True)
        ],
        property=body.property or "",
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in the format that Weaviate shows."""
    return status, {"error": message}


WEAVIATE = Dialect(
    name="rerank_weaviate",
    servers=("Weaviate",),
    description="Weaviate's, with `property`: in the order of the request.",
    paths=("/rerank",),
    field="property",
    request=WeaviateRequest,
    answer=WeaviateResponse,
    parse=parse,
    render=render,
    error=error,
)
