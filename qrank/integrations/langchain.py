"""LangChain: a document compressor, and a cross-encoder for those who take one.

from langchain_classic.retrievers import ContextualCompressionRetriever
from qrank.integrations.langchain import QrankRerank

ContextualCompressionRetriever(base_compressor=QrankRerank(top_n=5), base_retriever=...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr

from qrank.integrations.lazy import LazyReranker, score_of


class QrankRerank(BaseDocumentCompressor):
    """Orders documents by relevance to the query, and keeps the best.

    Copies of the documents are returned, with their score as `metadata["relevance_score"]`.

    Attributes:
        model: as for `qrank.Reranker`.
        top_n: number of documents to keep. None: all.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        budget_ms: as for `Reranker.rank`.
        options: other arguments of `Reranker`: `backend`, `threads`, ...
    """

    model: str = "mini"
    top_n: int | None = Field(default=3, ge=0)
    instruction: str | None = None
    long_documents: Literal["truncate", "tail", "chunk"] = "truncate"
    budget_ms: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(extra="forbid")

    _reranker: LazyReranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """See pydantic: keep the arguments of the model, which is opened at first use."""
        self._reranker = LazyReranker(self.model, self.options)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks = None
    ) -> Sequence[Document]:
        """The best documents, the most relevant first.

        Args:
            documents: what to order.
            query: the query.
            callbacks: of no effect.

        Raises:
            QrankError: as for `Reranker` and `Reranker.rank`.
        """
        self._reranker = self._reranker.of(self.model, self.options)
        found = self._reranker().rank(
            query,
            [document.page_content for document in documents],
            top_k=self.top_n,
            instruction=self.instruction,
            long_documents=self.long_documents,
            budget_ms=self.budget_ms,
        )
        return [
            documents[each.index].model_copy(
                update={
                    "metadata": {
                        **documents[each.index].metadata,
                        "relevance_score": score_of(each),
                    }
                }
            )
            for each in found
        ]


class QrankCrossEncoder(BaseCrossEncoder):
    """Scores pairs of texts; for LangChain's `CrossEncoderReranker`, which drops the scores."""

    def __init__(self, model: str = "mini", **options: Any) -> None:
        """Keep the arguments; the model is opened at first use.

        Args:
            model: as for `qrank.Reranker`.
            options: other arguments of `Reranker`.
        """
        self._reranker = LazyReranker(model, options)

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Scores of (query, document) pairs, in their order.

        Raises:
            QrankError: as for `Reranker` and `Reranker.score`.
        """
        scores: list[float] = self._reranker().score(text_pairs).tolist()
        return scores
