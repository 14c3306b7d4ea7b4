"""vLLM's POST /score: pairs, in the order they are sent."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Discriminator, Field, Tag

from qrank.serve.dialect import Dialect
from qrank.serve.dialect_rerank import check_truncation
from qrank.serve.request import RequestError, RerankOutcome, RerankTask
from qrank.serve.schemas import Count, Extended, Text, TextList, TokenUsage, new_id, token_usage
from qrank.serve.validation import WANTED, tag


def _one_or_list(value: object) -> str | None:
    if isinstance(value, str):
        return tag("string")
    return tag("list") if isinstance(value, list) else None


OneOrMore = Annotated[
    Annotated[Text, Tag(tag("string"))] | Annotated[TextList, Tag(tag("list"))],
    Discriminator(
        _one_or_list,
        custom_error_type=WANTED,
        custom_error_message="a string, or a list of strings",
    ),
]


class ScoreRequest(Extended):
    """A request of vLLM's POST /score: one query for all documents, or one for each."""

    text_1: OneOrMore = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    text_2: OneOrMore = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2")
    )
    max_tokens_per_doc: Count | None = None
    max_tokens_per_query: Count | None = Field(None, description="Only 0 and null.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Only null and -1: see max_tokens_per_doc."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="left: read the end of a document that does not fit."
    )
    use_activation: bool | None = Field(
        None,
        validation_alias=AliasChoices("use_activation", "activation"),
        description="false: logits instead of scores.",
    )


class ScoreResult(BaseModel):
    """One pair; pairs keep the order in which they were sent."""

    index: int
    object: Literal["score"] = "score"
    score: float
    scored: Literal[False] | None = None


class ScoreResponse(BaseModel):
    """vLLM's response."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreResult]
    usage: TokenUsage


def parse(body: ScoreRequest) -> RerankTask:
    """The task of a request.

    Raises:
        RequestError: the numbers of queries and documents do not match, or it asks to truncate in
            a way that qrank does not have.
    """
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise RequestError(
            400, f"{len(first)} queries for {len(second)} documents; give one, or as many"
        )
    check_truncation(body.max_tokens_per_query, body.truncate_prompt_tokens)
    return body.task(
        list(zip(first, second, strict=True)),
        document_tokens=body.max_tokens_per_doc or None,
        left=body.truncation_side == "left",
    )


def render(body: ScoreRequest, outcome: RerankOutcome) -> ScoreResponse:
    """The response, in vLLM's format and the order in which the pairs were sent."""
    values = outcome.logits if body.use_activation is False else outcome.scores
    return ScoreResponse(
        id=new_id("score"),
        created=int(time.time()),
        model=outcome.model,
        data=[
            ScoreResult(index=i, score=value, scored=None if outcome.scored[i] else False)
            for i, value in enumerate(values)
        ],
        usage=token_usage(outcome),
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in vLLM's format, which is OpenAI's."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


SCORE = Dialect(
    name="score",
    servers=("vLLM",),
    description="vLLM's: pairs, in the order they are sent.",
    paths=("/score", "/v1/score"),
    request=ScoreRequest,
    answer=ScoreResponse,
    parse=parse,
    render=render,
    error=error,
)
