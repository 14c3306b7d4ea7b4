"""The POST /v1/rerank of LibreChat's RAG API, with `candidates`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from qrank.serve.dialect import Dialect
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.schemas import Count, Extended, Text


class Candidate(BaseModel):
    """A document."""

    text: Text


class LibreChatRequest(Extended):
    """A request of LibreChat."""

    query: Text
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    top_n: Count | None = Field(None, description="Return only so many; 0 and null: all.")
    profile: str | None = Field(None, description="Of no effect here: name a model instead.")


class LibreChatResult(BaseModel):
    """One candidate of the sorted list."""

    index: int
    score: float


class LibreChatResponse(BaseModel):
    """The response."""

    results: list[LibreChatResult]


def parse(body: LibreChatRequest) -> RerankTask:
    """The task of a request."""
    return body.task([(body.query, candidate.text) for candidate in body.candidates])


def render(body: LibreChatRequest, outcome: RerankOutcome) -> LibreChatResponse:
    """The response, best first."""
    return LibreChatResponse(
        results=[
            LibreChatResult(index=i, score=outcome.scores[i])
            for i in outcome.order[: body.top_n or None]
        ]
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in the API's format."""
    return status, {"detail": message}


LIBRECHAT = Dialect(
    name="rerank_librechat",
    servers=("LibreChat",),
    description="LibreChat's, with `candidates`.",
    paths=("/v1/rerank",),
    field="candidates",
    request=LibreChatRequest,
    answer=LibreChatResponse,
    parse=parse,
    render=render,
    error=error,
)
