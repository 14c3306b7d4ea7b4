"""NVIDIA NIM's POST /v1/ranking; RAGFlow and LangChain's NVIDIARerank send it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from qrank.serve.dialect import Dialect
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.schemas import Extended, Text, TokenUsage, token_usage


class NimText(BaseModel):
    """A query or a passage."""

    text: Text


class NimRequest(Extended):
    """A request of NIM's ranking API."""

    query: NimText
    passages: Annotated[list[NimText], Field(min_length=1)]
    truncate: Literal["NONE", "END"] = Field(
        "END", description="NONE: refuse a passage that does not fit. Default: cut it."
    )


class NimRanking(BaseModel):
    """One passage of the sorted list."""

    index: int
    logit: float


class NimResponse(BaseModel):
    """NIM's response."""

    rankings: list[NimRanking]
    usage: TokenUsage


def parse(body: NimRequest) -> RerankTask:
    """The task of a request."""
    pairs = [(body.query.text, passage.text) for passage in body.passages]
    return body.task(pairs, whole=body.truncate == "NONE")


def render(body: NimRequest, outcome: RerankOutcome) -> NimResponse:
    """The response: every passage, best first, with its logit."""
    return NimResponse(
        rankings=[NimRanking(index=i, logit=outcome.logits[i]) for i in outcome.order],
        usage=token_usage(outcome),
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in NIM's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"object": "error", "message": message, "detail": {}, "type": kind}


NIM = Dialect(
    name="ranking",
    servers=("NVIDIA NIM",),
    description="NVIDIA NIM's, with `passages`.",
    paths=("/v1/ranking", "/rerank", "/v1/rerank"),
    field="passages",
    request=NimRequest,
    answer=NimResponse,
    parse=parse,
    render=render,
    error=error,
)
