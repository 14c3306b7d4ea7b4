"""LanceDB: a reranker of search results.

from qrank.integrations.lancedb import QrankReranker

table.search("query", query_type="hybrid").rerank(QrankReranker(column="text"))
"""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
from lancedb.rerankers.base import Reranker as BaseReranker

from qrank.errors import InputError
from qrank.integrations.lazy import LazyReranker, score_of

SCORE = "_relevance_score"
"""The column that LanceDB expects scores in."""


class QrankReranker(BaseReranker):
    """Orders the rows of vector, full-text and hybrid searches by relevance to the query."""

    def __init__(
        self,
        model: str = "mini",
        column: str = "text",
        return_score: str = "relevance",
        instruction: str | None = None,
        long_documents: Literal["truncate", "tail", "chunk"] = "truncate",
        budget_ms: float | None = None,
        **options: Any,
    ) -> None:
        """Keep the arguments; the model is opened at first use.

        Args:
            model: as for `qrank.Reranker`.
            column: the column that holds the documents' texts.
            return_score: "relevance": qrank's score alone; "all": the searches' scores too.
            instruction: as for `Reranker.rank`.
            long_documents: as for `Reranker.rank`.
            budget_ms: as for `Reranker.rank`.
            options: other arguments of `Reranker`.
        """
        super().__init__(return_score)
        self.column = column
        self.instruction = instruction
        self.long_documents = long_documents
        self.budget_ms = budget_ms
        self._reranker = LazyReranker(model, options)

    def rerank_hybrid(
        self, query: str, vector_results: pa.Table, fts_results: pa.Table
    ) -> pa.Table:
        """The rows of both searches, the most relevant first."""
        if self.score == "all":
            merged = self._merge_and_keep_scores(vector_results, fts_results)
        else:
            merged = self.merge_results(vector_results, fts_results)
        ranked = self._ranked(query, merged)
        return ranked if self.score == "all" else self._keep_relevance_score(ranked)

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """The rows of a vector search, the most relevant first."""
        return self._alone(self._ranked(query, vector_results), "_distance")

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        """The rows of a full-text search, the most relevant first."""
        return self._alone(self._ranked(query, fts_results), "_score")

    def _ranked(self, query: str, rows: pa.Table) -> pa.Table:
        if self.column not in rows.column_names:
            raise InputError(
                f"the search's rows have no column {self.column!r}; they have: "
                f"{', '.join(rows.column_names)}. Say which holds the texts (column=)"
            )
        found = self._reranker().rank(
            # The text of a MatchQuery or PhraseQuery.
            getattr(query, "query", query),
            rows[self.column],
            instruction=self.instruction,
            long_documents=self.long_documents,
            budget_ms=self.budget_ms,
        )
        order = pa.array([each.index for each in found], pa.int64())
        scores = pa.array([score_of(each) for each in found], pa.float32())
        return rows.take(order).append_column(SCORE, scores)

    def _alone(self, rows: pa.Table, column: str) -> pa.Table:
        """Without the search's own score, unless all are wanted."""
        drop = self.score == "relevance" and column in rows.column_names
        return rows.drop_columns([column]) if drop else rows
