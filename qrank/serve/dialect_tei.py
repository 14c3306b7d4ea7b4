"""text-embeddings-inference's POST /rerank."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from qrank.serve.dialect import Dialect
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.schemas import Extended, Text, TextList


class TeiRequest(Extended):
    """A request of text-embeddings-inference's POST /rerank."""

    query: Text
    texts: TextList
    raw_scores: bool | None = Field(False, description="Logits instead of scores.")
    return_text: bool | None = False
    truncate: bool | None = Field(
        None, description="false: refuse a text that does not fit. Default: cut it."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = "Right"


class TeiRank(BaseModel):
    """One text of the sorted list."""

    index: int
    text: str | None = None
    score: float


def parse(body: TeiRequest) -> RerankTask:
    """The task of a request; truncation at the left is `long_documents: tail`."""
    left = (body.truncation_direction or "right").lower() == "left"
    pairs = [(body.query, text) for text in body.texts]
    return body.task(pairs, left=left, whole=body.truncate is False)


def render(body: TeiRequest, outcome: RerankOutcome) -> list[TeiRank]:
    """The response: a bare array."""
    values = outcome.logits if body.raw_scores else outcome.scores
    return [
        TeiRank(index=i, text=body.texts[i] if body.return_text else None, score=values[i])
        for i in outcome.order
    ]


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in TEI's format, with status 424 for an error of the backend."""
    kinds = {429: "Overloaded", 500: "Backend", 503: "Unhealthy"}
    shown = 424 if status == 500 else status
    return shown, {"error": message, "error_type": kinds.get(status, "Validation")}


TEI = Dialect(
    name="rerank",
    servers=("TEI",),
    description="TEI's, with `texts`.",
    paths=("/rerank",),
    field="texts",
    request=TeiRequest,
    answer=list[TeiRank],
    parse=parse,
    render=render,
    error=error,
)
