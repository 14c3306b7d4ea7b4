"""POST /api/rerank, as proposed for Ollama."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from qrank.serve.dialect import Dialect
from qrank.serve.dialect_rerank import RerankRequest, as_sent, parse, top
from qrank.serve.request import RerankOutcome


class OllamaResult(BaseModel):
    """One document of the sorted list, in the form in which it was sent."""

    index: int
    document: str | dict[str, Any] | None = None
    relevance_score: float


class OllamaResponse(BaseModel):
    """The response as proposed for Ollama; times in nanoseconds, as in its other responses."""

    model: str
    results: list[OllamaResult]
    total_duration: int
    prompt_eval_count: int


def render(body: RerankRequest, outcome: RerankOutcome) -> OllamaResponse:
    """The response, in Ollama's format."""
    documents = body.return_documents is not False
    return OllamaResponse(
        model=outcome.model,
        results=[
            OllamaResult(
                index=i,
                document=as_sent(body.documents[i]) if documents else None,
                relevance_score=outcome.scores[i],
            )
            for i in top(body, outcome)
        ],
        total_duration=int(outcome.seconds * 1e9),
        prompt_eval_count=outcome.tokens,
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in Ollama's format."""
    return status, {"error": message}


OLLAMA = Dialect(
    name="rerank_ollama",
    servers=("Ollama",),
    description="Ollama's, as proposed.",
    paths=("/api/rerank",),
    request=RerankRequest,
    answer=OllamaResponse,
    parse=parse,
    render=render,
    error=error,
)
