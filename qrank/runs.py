"""Rerank a TREC run file: as many queries as it holds, in memory for one."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby
from pathlib import Path

from qrank.errors import InputError
from qrank.items import LongDocuments
from qrank.records import Texts, run_lines
from qrank.reranker import Reranker

TAG = "qrank"
"""The last column of a run qrank writes."""


def falling(logits: Sequence[float]) -> list[float]:
    """Logits of a ranked list, NaNs at its end falling on by 1 each: evaluators sort by them."""
    scored = [logit for logit in logits if not math.isnan(logit)]
    lowest = scored[-1] if scored else 0.0
    return scored + [lowest - number for number in range(1, len(logits) - len(scored) + 1)]


class RunReranker:
    """A run checked from end to end before anything is scored.

    Args:
        run: TREC run file: query, Q0, document, rank, score, tag; grouped by query.
        queries: JSONL of {"id" or "_id", "text"}.
        documents: likewise.

    Raises:
        InputError: a file cannot be read or parsed, the run is not grouped by query, or names
            what the other files lack; with the line.
    """

    def __init__(self, run: Path, queries: Path, documents: Path) -> None:
        self._run = run
        with ExitStack() as opened:
            self._queries = opened.enter_context(closing(Texts(queries, "query")))
            self._documents = opened.enter_context(closing(Texts(documents, "document")))
            with closing(sqlite3.connect("")) as seen:
                self.count = self._check(seen)
                """Queries in the run."""
            self._opened = opened.pop_all()

    def rerank(
        self,
        reranker: Reranker,
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Iterator[list[str]]:
        """The reranked run, a query at a time, as lines without line ends; see `Reranker.rank`.

        Scores are logits: an evaluator sorts by them, and an activation may tie what they order.
        """
        for query, lines in groupby(run_lines(self._run), key=lambda line: line.query):
            identities = [line.document for line in lines]
            texts = [self._documents[identity] for identity in identities]
            ranking = reranker.rank(
                self._queries[query],
                texts,
                top_k=top_k,
                instruction=instruction,
                long_documents=long_documents,
                budget_ms=budget_ms,
            )
            numbers = falling([item.logit for item in ranking])
            yield [
                f"{query} Q0 {identities[item.index]} {rank} {number:.6f} {TAG}"
                for rank, (item, number) in enumerate(zip(ranking, numbers, strict=True), 1)
            ]

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def _check(self, seen: sqlite3.Connection) -> int:
        seen.execute("CREATE TABLE query (id TEXT PRIMARY KEY)")
        count = 0
        current = None
        documents: set[str] = set()
        for line in run_lines(self._run):
            where = f"{self._run}, line {line.number}"
            if line.query != current:
                current = line.query
                documents.clear()
                count += 1
                if current not in self._queries:
                    raise InputError(f"{where}: the queries file lacks query {current!r}")
                try:
                    seen.execute("INSERT INTO query VALUES (?)", (current,))
                except sqlite3.IntegrityError:
                    raise InputError(
                        f"{where}: query {current!r} comes back after another one; "
                        "sort the run by query first"
                    ) from None
            if line.document not in self._documents:
                raise InputError(f"{where}: the documents file lacks {line.document!r}")
            if line.document in documents:
                raise InputError(
                    f"{where}: document {line.document!r} stands there twice for query {current!r}"
                )
            documents.add(line.document)
        return count
