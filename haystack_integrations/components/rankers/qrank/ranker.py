"""A ranker component for Haystack, which orders documents by a qrank model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Literal

from haystack import Document, component, default_from_dict, default_to_dict

from qrank.errors import InputError
from qrank.integrations.lazy import LazyReranker
from qrank.reranker import Reranker

LongDocuments = Literal["truncate", "tail", "chunk"]


@component
class QrankRanker:
    """Orders documents by relevance to the query, and keeps the best.

    Copies are returned, with their score. Of documents with the same id, the one with the highest
    score on entry is taken, as Haystack's own rankers do.
    """

    def __init__(
        self,
        model: str = "mini",
        *,
        top_k: int | None = 10,
        query_prefix: str = "",
        document_prefix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        scale_score: bool = True,
        score_threshold: float | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Keep the arguments; the model is opened by `warm_up` or at first use.

        Args:
            model: as for `qrank.Reranker`.
            top_k: number of documents to keep. None: all.
            query_prefix: text to put before the query.
            document_prefix: text to put before each document.
            meta_fields_to_embed: metadata to put before each document's content.
            embedding_separator: between these fields and the content.
            scale_score: give scores after the model's activation; False: logits.
            score_threshold: drop documents with a lower score, and those without a score.
            instruction: as for `Reranker.rank`.
            long_documents: as for `Reranker.rank`.
            budget_ms: as for `Reranker.rank`.
            options: other arguments of `Reranker`, by name.
        """
        self.model = model
        self.top_k = top_k
        self.query_prefix = query_prefix
        self.document_prefix = document_prefix
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.scale_score = scale_score
        self.score_threshold = score_threshold
        self.instruction = instruction
        self.long_documents = long_documents
        self.budget_ms = budget_ms
        self.options = options or {}
        self._reranker = LazyReranker(model, self.options)

    def warm_up(self) -> None:
        """Open the model, if it is not yet."""
        self._opened()

    def close(self) -> None:
        """Free the model; it is opened again when it is needed."""
        self._reranker.close()

    def to_dict(self) -> dict[str, Any]:
        """The component as a dictionary of basic types."""
        stored: dict[str, Any] = default_to_dict(
            self,
            model=self.model,
            top_k=self.top_k,
            query_prefix=self.query_prefix,
            document_prefix=self.document_prefix,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            scale_score=self.scale_score,
            score_threshold=self.score_threshold,
            instruction=self.instruction,
            long_documents=self.long_documents,
            budget_ms=self.budget_ms,
            options=self.options,
        )
        return stored

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QrankRanker:
        """The inverse of `to_dict`."""
        made: QrankRanker = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """The best documents, the most relevant first.

        Args:
            query: the query.
            documents: what to order.
            top_k: instead of the component's.
            scale_score: instead of the component's.
            score_threshold: instead of the component's.

        Raises:
            QrankError: as for `Reranker` and `Reranker.rank`.
        """
        scaled = self.scale_score if scale_score is None else scale_score
        least = self.score_threshold if score_threshold is None else score_threshold
        unique = _unique(documents)
        found = self._opened().rank(
            self.query_prefix + query,
            [self._text(document) for document in unique],
            top_k=self.top_k if top_k is None else top_k,
            instruction=self.instruction,
            long_documents=self.long_documents,
            budget_ms=self.budget_ms,
        )
        ranked = []
        for each in found:
            score = (each.score if scaled else each.logit) if each.scored else None
            if least is None or (score is not None and score >= least):
                ranked.append(replace(unique[each.index], score=score))
        return {"documents": ranked}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """As `run`, in a thread of its own: the event loop goes on."""
        return await asyncio.to_thread(
            self.run, query, documents, top_k, scale_score, score_threshold
        )

    def _opened(self) -> Reranker:
        self._reranker = self._reranker.of(self.model, self.options)
        return self._reranker()

    def _text(self, document: Document) -> str:
        if document.content is None:
            raise InputError(f"document {document.id} has no text to read (content is None)")
        fields = [
            str(document.meta[name])
            for name in self.meta_fields_to_embed
            if document.meta.get(name) is not None
        ]
        return self.document_prefix + self.embedding_separator.join([*fields, document.content])


def _unique(documents: list[Document]) -> list[Document]:
    """Documents without repeated ids; of several, the one with the highest score."""
    best: dict[str, Document] = {}
    for document in documents:
        known = best.get(document.id)
        if known is None or (document.score or 0.0) > (known.score or 0.0):
            best[document.id] = document
    return list(best.values())
