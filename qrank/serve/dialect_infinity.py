"""Infinity's POST /rerank, under /infinity: its requests look like Jina's, its answers do not."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, Field

from qrank.serve import dialect_score
from qrank.serve.dialect import Dialect
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.schemas import Count, Extended, Text, TextList, TokenUsage, new_id, token_usage


class InfinityRequest(Extended):
    """Infinity's request; documents are strings."""

    query: Text
    documents: TextList
    top_n: Count | None = Field(None, description="Return only so many; 0 and null: all.")
    return_documents: bool | None = Field(None, description="Default: false.")


class InfinityResult(BaseModel):
    """One document of the sorted list."""

    index: int
    relevance_score: float
    document: str | None = None


class InfinityResponse(BaseModel):
    """Infinity's response."""

    id: str
    object: Literal["rerank"] = "rerank"
    created: int
    model: str
    results: list[InfinityResult]
    usage: TokenUsage


def parse(body: InfinityRequest) -> RerankTask:
    """The task of a request."""
    return body.task([(body.query, document) for document in body.documents])


def render(body: InfinityRequest, outcome: RerankOutcome) -> InfinityResponse:
    """The response, in Infinity's format."""
    return InfinityResponse(
        id=new_id("infinity"),
        created=int(time.time()),
        model=outcome.model,
        results=[
            InfinityResult(
                index=i,
                relevance_score=outcome.scores[i],
                document=body.documents[i] if body.return_documents else None,
            )
            for i in outcome.order[: body.top_n or None]
        ],
        usage=token_usage(outcome),
    )


INFINITY = Dialect(
    name="infinity",
    servers=("Infinity",),
    description="Infinity's: documents are strings in the answer too.",
    paths=("/infinity/rerank",),
    request=InfinityRequest,
    answer=InfinityResponse,
    parse=parse,
    render=render,
    # OpenAI's.
    error=dialect_score.error,
)
