"""What each dialect sends and gets, as its own clients write and read it.

| dialect | request | peers |
|---|---|---|
| TEI | `TeiRequest` -> `list[TeiRank]` | text-embeddings-inference |
| rerank | `RerankRequest` -> `RerankResponse` | Jina, Cohere v1, vLLM, llama.cpp at once |
| Cohere | `RerankRequest` -> `CohereResponse` | Cohere v2 |
| Ollama | `RerankRequest` -> `OllamaResponse` | Ollama's proposed `/api/rerank` |
| score | `ScoreRequest` -> `ScoreResponse` | vLLM |

Fields that qrank has no use for are ignored, as the peers do among each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticSerializationError, to_json

from qrank.serve.validation import WANTED, tag

_HALF = "it holds half of a surrogate pair, which is no unicode"


def _sound(text: str) -> str:
    """JSON can escape half a character, which no answer could hold."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise ValueError(_HALF) from None
    return text


def _one_or_list(value: object) -> str | None:
    if isinstance(value, str):
        return tag("string")
    return tag("list") if isinstance(value, list) else None


def _text_or_object(value: object) -> str | None:
    if isinstance(value, str):
        return tag("string")
    return tag("object") if isinstance(value, Mapping | BaseModel) else None


Text = Annotated[str, AfterValidator(_sound)]
Texts = Annotated[list[Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
OneOrMore = Annotated[
    Annotated[Text, Tag(tag("string"))] | Annotated[Texts, Tag(tag("list"))],
    Discriminator(
        _one_or_list,
        custom_error_type=WANTED,
        custom_error_message="a string, or a list of strings",
    ),
]


class Extended(BaseModel):
    """What every request may say beyond its dialect."""

    model: str | None = Field(None, description="Name of a served model; the first by default.")
    instruction: str | None = Field(
        None, description='What "relevant" means, for models that take an instruction.'
    )
    budget_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Answer after about so long; documents not scored by then come last, in the "
        "order they were sent.",
    )
    long_documents: Literal["truncate", "tail", "chunk"] = Field(
        "truncate",
        description="What is read of a document that does not fit: its beginning, its end, or "
        "its best part.",
    )


class TeiRequest(Extended):
    """As text-embeddings-inference's POST /rerank."""

    query: Text
    texts: Texts
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


class Document(BaseModel):
    """A document with fields of its own, which are returned with it."""

    model_config = ConfigDict(extra="allow")

    text: str | None = None

    @model_validator(mode="after")
    def _returnable(self) -> Document:
        # In as many lists as an answer may be around it: there is a deepest that can be written.
        try:
            to_json([[[[[[self.model_dump()]]]]]])
        except PydanticSerializationError as error:
            surrogate = "surrogates not allowed" in str(error)
            raise ValueError(_HALF if surrogate else "it is nested too deeply") from None
        return self


TextOrObject = Annotated[
    Annotated[Text, Tag(tag("string"))] | Annotated[Document, Tag(tag("object"))],
    Discriminator(
        _text_or_object,
        custom_error_type=WANTED,
        custom_error_message='a string, or an object with "text"',
    ),
]


class RerankRequest(Extended):
    """As Jina's, Cohere's, vLLM's, llama.cpp's and Ollama's."""

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


class RerankResult(BaseModel):
    """One document of the sorted list."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None
    truncated: Literal[True] | None = Field(None, description="Only a part of it was read.")
    scored: Literal[False] | None = Field(
        None, description="The time was up before its turn; its score is the lowest of the others'."
    )


class Usage(BaseModel):
    """Tokens the model read."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(BaseModel):
    """Which of Cohere's."""

    version: str


class BilledUnits(BaseModel):
    """What Cohere would bill."""

    search_units: int = 1


class Tokens(BaseModel):
    """Tokens the model read, in Cohere's words."""

    input_tokens: int
    output_tokens: int = 0


class Meta(BaseModel):
    """Cohere's."""

    api_version: ApiVersion
    billed_units: BilledUnits = BilledUnits()
    tokens: Tokens


class RerankResponse(BaseModel):
    """Everything that Jina, Cohere v1, vLLM and llama.cpp answer."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: Usage
    meta: Meta


class CohereResponse(BaseModel):
    """As Cohere's v2."""

    id: str
    results: list[RerankResult]
    meta: Meta


class OllamaResult(BaseModel):
    """One document of the sorted list; the document as it was sent."""

    index: int
    document: str | dict[str, Any] | None = None
    relevance_score: float


class OllamaResponse(BaseModel):
    """As proposed for Ollama; times in nanoseconds, as its other answers have them."""

    model: str
    results: list[OllamaResult]
    total_duration: int
    prompt_eval_count: int


class ScoreRequest(Extended):
    """As vLLM's POST /score: one query for all documents, or one for each."""

    text_1: OneOrMore = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    text_2: OneOrMore = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2")
    )
    max_tokens_per_doc: Count | None = None
    use_activation: bool | None = Field(
        None,
        validation_alias=AliasChoices("use_activation", "activation"),
        description="false: logits instead of scores.",
    )


class ScoreResult(BaseModel):
    """One pair, in the order they were sent."""

    index: int
    object: Literal["score"] = "score"
    score: float
    scored: Literal[False] | None = None


class ScoreResponse(BaseModel):
    """As vLLM's."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreResult]
    usage: Usage


class ModelCard(BaseModel):
    """One of the served models, as OpenAI lists them."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qrank"


class ModelList(BaseModel):
    """As OpenAI's GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
