"""POST /v1/rerank: what Jina, Cohere v1, vLLM and llama.cpp have in common.

Cohere v2 and Ollama have the same requests, but other responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticSerializationError, to_json

from qrank.serve.dialect import Dialect
from qrank.serve.request import RequestError, RerankOutcome, RerankTask
from qrank.serve.schemas import (
    HALF_SURROGATE,
    Count,
    Extended,
    Text,
    TokenUsage,
    new_id,
    token_usage,
)
from qrank.serve.validation import WANTED, tag


class Document(BaseModel):
    """A document with its own fields, which are returned with it."""

    model_config = ConfigDict(extra="allow")

    text: str | None = None

    @model_validator(mode="after")
    def _returnable(self) -> Document:
        # Nested as deeply as in an answer, because serialization has a depth limit.
        try:
            to_json([[[[[[self.model_dump()]]]]]])
        except PydanticSerializationError as error:
            surrogate = "surrogates not allowed" in str(error)
            raise ValueError(HALF_SURROGATE if surrogate else "it is nested too deeply") from None
        return self


def _text_or_object(value: object) -> str | None:
    if isinstance(value, str):
        return tag("string")
    return tag("object") if isinstance(value, Mapping | BaseModel) else None


TextOrObject = Annotated[
    Annotated[Text, Tag(tag("string"))] | Annotated[Document, Tag(tag("object"))],
    Discriminator(
        _text_or_object,
        custom_error_type=WANTED,
        custom_error_message='a string, or an object with "text"',
    ),
]


class RerankRequest(Extended):
    """A request of Jina, Cohere, vLLM, llama.cpp and Ollama."""

    query: Text
    documents: list[TextOrObject] = Field(min_length=1)
    top_n: Count | None = Field(None, description="Return only so many; 0 and null: all.")
    return_documents: bool | None = Field(
        None, description="Default: true, but false at /v2/rerank, as Cohere has it."
    )
    max_tokens_per_doc: Count | None = Field(
        None, description="Tokens that are read of a document; 0 and null: what fits."
    )
    rank_fields: list[str] | None = Field(
        None, description="Fields of a document object to read, in this order. Default: text."
    )
    max_tokens_per_query: Count | None = Field(
        None, description="vLLM's. Only 0 and null: queries are cut by the model's limit."
    )
    truncate_prompt_tokens: int | None = Field(
        None, description="vLLM's. Only null and -1: see max_tokens_per_doc."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="vLLM's. left: read the end of a document that does not fit."
    )


class RerankResult(BaseModel):
    """One document of the sorted list."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None
    truncated: Literal[True] | None = Field(None, description="Only a part of it was read.")
    scored: Literal[False] | None = Field(
        None, description="The time was up before its turn; its score is the lowest of the others'."
    )


class ApiVersion(BaseModel):
    """The version of Cohere's API."""

    version: str


class BilledUnits(BaseModel):
    """What Cohere would bill."""

    search_units: int = 1


class MetaTokens(BaseModel):
    """Tokens the model read, in Cohere's words."""

    input_tokens: int
    output_tokens: int = 0


class Meta(BaseModel):
    """Cohere's `meta`."""

    api_version: ApiVersion
    billed_units: BilledUnits = BilledUnits()
    tokens: MetaTokens


class RerankResponse(BaseModel):
    """A response with all fields of Jina, Cohere v1, vLLM and llama.cpp."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: TokenUsage
    meta: Meta


def parse(body: RerankRequest) -> RerankTask:
    """The task of a request.

    Raises:
        RequestError: a document has no text, or lacks the fields to read.
    """
    texts = [
        document if isinstance(document, str) else _text(document, body.rank_fields, place)
        for place, document in enumerate(body.documents)
    ]
    check_truncation(body.max_tokens_per_query, body.truncate_prompt_tokens)
    return body.task(
        [(body.query, text) for text in texts],
        document_tokens=body.max_tokens_per_doc or None,
        left=body.truncation_side == "left",
    )


def check_truncation(query_tokens: int | None, prompt_tokens: int | None) -> None:
    """Refuse vLLM's ways to truncate that qrank does not have.

    Raises:
        RequestError: one is asked for.
    """
    if query_tokens:
        raise RequestError(
            422,
            f"max_tokens_per_query is {query_tokens}; queries are cut by the model's limit alone: "
            "leave it out",
        )
    if prompt_tokens not in (None, -1):
        raise RequestError(
            422,
            f"truncate_prompt_tokens is {prompt_tokens}; documents alone are cut: send "
            "max_tokens_per_doc instead",
        )


def _text(document: Document, fields: Sequence[str] | None, place: int) -> str:
    content = document.model_dump()
    if not fields:
        if document.text is not None:
            return document.text
        if isinstance(parts := content.get("content"), list):
            return _joined(parts, place)
        raise RequestError(422, f"documents[{place}] has no text; give one, or name rank_fields")
    values = [content[name] for name in fields if content.get(name) is not None]
    if not values:
        raise RequestError(422, f"documents[{place}] has none of the rank_fields")
    return "\n".join(str(value) for value in values)


def _joined(parts: list[Any], place: int) -> str:
    """The text of a document's content parts, as chat APIs have them: Dify's and vLLM's."""
    texts = []
    for number, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise RequestError(
                422,
                f"documents[{place}].content[{number}] is no part with a text; this server reads "
                "text alone",
            )
        texts.append(text)
    return "\n".join(texts)


def top(body: RerankRequest, outcome: RerankOutcome) -> list[int]:
    """The documents to return, best first."""
    return outcome.order[: body.top_n or None]


def as_sent(document: str | Document) -> str | dict[str, Any]:
    """A document as the client sent it."""
    return document if isinstance(document, str) else document.model_dump(exclude_unset=True)


def results(body: RerankRequest, outcome: RerankOutcome, *, documents: bool) -> list[RerankResult]:
    """The sorted list; `documents`: each with its document, as an object."""

    def shown(place: int) -> dict[str, Any]:
        document = as_sent(body.documents[place])
        return {"text": document} if isinstance(document, str) else document

    return [
        RerankResult(
            index=i,
            relevance_score=outcome.scores[i],
            document=shown(i) if documents else None,
            truncated=True if outcome.truncated[i] else None,
            scored=None if outcome.scored[i] else False,
        )
        for i in top(body, outcome)
    ]


def meta(version: str, outcome: RerankOutcome) -> Meta:
    """Cohere's `meta`, for a version of its API."""
    return Meta(
        api_version=ApiVersion(version=version), tokens=MetaTokens(input_tokens=outcome.tokens)
    )


def render(body: RerankRequest, outcome: RerankOutcome) -> RerankResponse:
    """The response, with the fields of Jina, Cohere, vLLM and llama.cpp."""
    return RerankResponse(
        id=new_id("rerank"),
        model=outcome.model,
        results=results(body, outcome, documents=body.return_documents is not False),
        usage=token_usage(outcome),
        meta=meta("1", outcome),
    )


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error, in Jina's format."""
    return status, {"detail": message}


RERANK = Dialect(
    name="rerank_v1",
    servers=("Jina", "Cohere", "vLLM", "llama.cpp"),
    description="Jina's, llama.cpp's, vLLM's and Cohere's v1, with `documents`.",
    paths=("/v1/rerank", "/rerank"),
    request=RerankRequest,
    answer=RerankResponse,
    parse=parse,
    render=render,
    error=error,
)
