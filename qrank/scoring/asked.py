"""The arguments of `Reranker.rank` and `Cascade.rank`, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from qrank.scoring import arguments
from qrank.scoring.inputs import LongDocuments, as_text, as_texts


@dataclass(frozen=True)
class Asked:
    """A query, its documents, and how to rank them: see `Reranker.rank`.

    Attributes:
        query: its text.
        texts: of the documents.
        top_k: maximum number of results; None: all.
        instruction: what "relevant" means; None: the family's default.
        long_documents: what is read of a document that does not fit.
        seconds: the budget; None: no limit.
    """

    query: str
    texts: list[str]
    top_k: int | None
    instruction: str | None
    long_documents: LongDocuments
    seconds: float | None

    @classmethod
    def of(
        cls,
        query: str,
        documents: Iterable[str | Mapping[str, Any]],
        text_key: str,
        top_k: int | None,
        instruction: str | None,
        long_documents: LongDocuments,
        budget_ms: float | None,
    ) -> Asked:
        """Check the arguments of a call.

        Raises:
            InputError: one is invalid, or a document has no text.
        """
        top_k = arguments.whole("top_k", top_k, 0)
        milliseconds = "milliseconds, more than 0"
        budget_ms = arguments.number("budget_ms", budget_ms, milliseconds, lambda x: x > 0)
        check_reading(instruction, long_documents)
        if not isinstance(text_key, str):
            raise arguments.wrong("text_key", text_key, "the name of the field with the text")
        query = as_text(query, "query")
        texts = as_texts(documents, "documents", "document", text_key)
        seconds = None if budget_ms is None else budget_ms / 1000
        return cls(query, texts, top_k, instruction, long_documents, seconds)


def check_reading(instruction: object, long_documents: object) -> None:
    """Reject an invalid instruction or way to treat long documents."""
    arguments.text("instruction", instruction)
    arguments.one_of("long_documents", long_documents, get_args(LongDocuments))
