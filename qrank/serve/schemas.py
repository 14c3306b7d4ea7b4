"""Fields that several dialects have in their requests and answers.

Unknown fields of a request have no effect, as the imitated servers ignore each other's fields; the
header `x-qrank-ignored` of the answer names them.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qrank.serve.request import RerankOutcome, RerankTask

HALF_SURROGATE = "it holds half of a surrogate pair, which is no unicode"


def _sound(text: str) -> str:
    """Refuse half of a surrogate pair: JSON can escape it, but no answer can contain it."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise ValueError(HALF_SURROGATE) from None
    return text


Text = Annotated[str, AfterValidator(_sound)]
TextList = Annotated[list[Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class Extended(BaseModel):
    """qrank's own fields, which requests of every dialect may have."""

    model_config = ConfigDict(extra="allow")

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
    long_documents: Literal["truncate", "tail", "chunk"] | None = Field(
        None,
        description="What is read of a document that does not fit: its beginning, its end, or "
        "its best part. Default: its beginning, unless the server has another one.",
    )

    @property
    def budget_seconds(self) -> float | None:
        """`budget_ms` in seconds."""
        return None if self.budget_ms is None else self.budget_ms / 1000

    def task(
        self,
        pairs: list[tuple[str, str]],
        *,
        document_tokens: int | None = None,
        left: bool = False,
        whole: bool = False,
    ) -> RerankTask:
        """The task of a request.

        Args:
            pairs: (query, document), in the order they were sent.
            document_tokens: see `RerankTask`.
            left: truncate at the left, which is `long_documents: tail`, unless it says otherwise.
            whole: see `RerankTask`.
        """
        tail = left and self.long_documents in (None, "truncate")
        return RerankTask(
            self.model,
            pairs,
            self.instruction,
            "tail" if tail else self.long_documents,
            document_tokens,
            self.budget_seconds,
            whole=whole,
        )


class TokenUsage(BaseModel):
    """Tokens the model read."""

    prompt_tokens: int
    total_tokens: int


def token_usage(outcome: RerankOutcome) -> TokenUsage:
    """The tokens of an outcome, in OpenAI's format."""
    return TokenUsage(prompt_tokens=outcome.tokens, total_tokens=outcome.tokens)


def new_id(kind: str) -> str:
    """A new id of an answer, as `rerank-0123...`."""
    return f"{kind}-{uuid.uuid4().hex}"
