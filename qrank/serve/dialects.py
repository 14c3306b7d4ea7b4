"""Requests of each dialect -> what is asked; what came of it -> each dialect's answer or error."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from qrank.serve import schemas
from qrank.serve.request import RequestError, RerankOutcome, RerankTask


def asked_tei(body: schemas.TeiRequest) -> RerankTask:
    """See `schemas.TeiRequest`."""
    left = (body.truncation_direction or "right").lower() == "left"
    return RerankTask(
        body.model,
        [(body.query, text) for text in body.texts],
        body.instruction,
        "tail" if left and body.long_documents == "truncate" else body.long_documents,
        None,
        _seconds(body),
        whole=body.truncate is False,
    )


def asked_rerank(body: schemas.RerankRequest) -> RerankTask:
    """See `schemas.RerankRequest`.

    Raises:
        RequestError: a document has no text, or lacks a field that is to be read.
    """
    texts = [
        document if isinstance(document, str) else _text(document, body.rank_fields, place)
        for place, document in enumerate(body.documents)
    ]
    return RerankTask(
        body.model,
        [(body.query, text) for text in texts],
        body.instruction,
        body.long_documents,
        body.max_tokens_per_doc or None,
        _seconds(body),
    )


def asked_score(body: schemas.ScoreRequest) -> RerankTask:
    """See `schemas.ScoreRequest`.

    Raises:
        RequestError: the numbers of queries and documents do not go together.
    """
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise RequestError(
            400, f"{len(first)} queries for {len(second)} documents; give one, or as many"
        )
    return RerankTask(
        body.model,
        list(zip(first, second, strict=True)),
        body.instruction,
        body.long_documents,
        body.max_tokens_per_doc or None,
        _seconds(body),
    )


def answer_tei(body: schemas.TeiRequest, outcome: RerankOutcome) -> list[schemas.TeiRank]:
    """A bare array."""
    values = outcome.logits if body.raw_scores else outcome.scores
    return [
        schemas.TeiRank(index=i, text=body.texts[i] if body.return_text else None, score=values[i])
        for i in outcome.order
    ]


def answer_rerank(body: schemas.RerankRequest, outcome: RerankOutcome) -> schemas.RerankResponse:
    """Jina's, Cohere's, vLLM's and llama.cpp's fields."""
    return schemas.RerankResponse(
        id=_identity("rerank"),
        model=outcome.model,
        results=_results(body, outcome, documents=body.return_documents is not False),
        usage=_usage(outcome),
        meta=_meta("1", outcome),
    )


def answer_cohere(body: schemas.RerankRequest, outcome: RerankOutcome) -> schemas.CohereResponse:
    """Cohere's fields, v2."""
    return schemas.CohereResponse(
        id=str(uuid.uuid4()),
        results=_results(body, outcome, documents=body.return_documents is True),
        meta=_meta("2", outcome),
    )


def answer_ollama(body: schemas.RerankRequest, outcome: RerankOutcome) -> schemas.OllamaResponse:
    """Ollama's."""
    shown = body.return_documents is not False
    return schemas.OllamaResponse(
        model=outcome.model,
        results=[
            schemas.OllamaResult(
                index=i,
                document=_as_sent(body.documents[i]) if shown else None,
                relevance_score=outcome.scores[i],
            )
            for i in _top(body, outcome)
        ],
        total_duration=int(outcome.seconds * 1e9),
        prompt_eval_count=outcome.tokens,
    )


def answer_score(body: schemas.ScoreRequest, outcome: RerankOutcome) -> schemas.ScoreResponse:
    """vLLM's, in the order the pairs were sent."""
    values = outcome.logits if body.use_activation is False else outcome.scores
    return schemas.ScoreResponse(
        id=_identity("score"),
        created=int(time.time()),
        model=outcome.model,
        data=[
            schemas.ScoreResult(index=i, score=value, scored=None if outcome.scored[i] else False)
            for i, value in enumerate(values)
        ],
        usage=_usage(outcome),
    )


Shape = Callable[[int, str], tuple[int, dict[str, Any]]]
"""Status and message -> the dialect's status and body."""


def _jina_error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"detail": message}


def _cohere_error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"id": str(uuid.uuid4()), "message": message}


def _ollama_error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": message}


def _tei_error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    kinds = {429: "Overloaded", 500: "Backend", 503: "Unhealthy"}
    # TEI's status for what its backend does wrong.
    shown = 424 if status == 500 else status
    return shown, {"error": message, "error_type": kinds.get(status, "Validation")}


def _vllm_error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


ERRORS: dict[str, Shape] = {
    "/rerank": _tei_error,
    "/v1/rerank": _jina_error,
    "/v2/rerank": _cohere_error,
    "/score": _vllm_error,
    "/v1/score": _vllm_error,
    "/v1/models": _vllm_error,
    "/api/rerank": _ollama_error,
}
"""By path."""


def shape(path: str) -> Shape:
    """How errors look at a path; elsewhere as Jina's."""
    return ERRORS.get(path, _jina_error)


def _seconds(body: schemas.Extended) -> float | None:
    return None if body.budget_ms is None else body.budget_ms / 1000


def _identity(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _text(document: schemas.Document, fields: Sequence[str] | None, place: int) -> str:
    if not fields:
        if document.text is None:
            raise RequestError(
                422, f"documents[{place}] has no text; give one, or name rank_fields"
            )
        return document.text
    content = document.model_dump()
    values = [content[name] for name in fields if content.get(name) is not None]
    if not values:
        raise RequestError(422, f"documents[{place}] has none of the rank_fields")
    return "\n".join(str(value) for value in values)


def _as_sent(document: str | schemas.Document) -> str | dict[str, Any]:
    return document if isinstance(document, str) else document.model_dump(exclude_unset=True)


def _top(body: schemas.RerankRequest, outcome: RerankOutcome) -> list[int]:
    return outcome.order[: body.top_n or None]


def _results(
    body: schemas.RerankRequest, outcome: RerankOutcome, *, documents: bool
) -> list[schemas.RerankResult]:
    def shown(place: int) -> dict[str, Any]:
        document = _as_sent(body.documents[place])
        return {"text": document} if isinstance(document, str) else document

    return [
        schemas.RerankResult(
            index=i,
            relevance_score=outcome.scores[i],
            document=shown(i) if documents else None,
            truncated=True if outcome.truncated[i] else None,
            scored=None if outcome.scored[i] else False,
        )
        for i in _top(body, outcome)
    ]


def _usage(outcome: RerankOutcome) -> schemas.Usage:
    return schemas.Usage(prompt_tokens=outcome.tokens, total_tokens=outcome.tokens)


def _meta(version: str, outcome: RerankOutcome) -> schemas.Meta:
    return schemas.Meta(
        api_version=schemas.ApiVersion(version=version),
        tokens=schemas.Tokens(input_tokens=outcome.tokens),
    )
