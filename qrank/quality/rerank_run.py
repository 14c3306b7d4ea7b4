"""Rerank a TREC run file of any number of queries, with only one of them in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby, islice
from pathlib import Path

from qrank.errors import InputError
from qrank.quality.records import Places, RunLine, Texts, run_lines
from qrank.reranker import Reranker
from qrank.scoring.inputs import LongDocuments
from qrank.system.textfiles import TextFile

TAG = "qrank"
"""The last column of a run qrank writes."""

LOGIT = ".9g"
"""Format of a logit: different float32 values are written differently."""


def falling(logits: Sequence[float]) -> list[float]:
    """Logits of a ranked list; NaNs at its end continue in steps of -1: evaluators sort by them."""
    scored = [logit for logit in logits if not math.isnan(logit)]
    lowest = scored[-1] if scored else 0.0
    return scored + [lowest - number for number in range(1, len(logits) - len(scored) + 1)]


class RunReranker:
    """Reranks a run, after checking all of it before anything is scored.

    Args:
        run: TREC run file: query, Q0, document, rank, score, tag; grouped by query.
        queries: JSONL with id and text: see `Texts`.
        documents: JSONL with id and text: see `Texts`.

    Attributes:
        files: the arguments.
        count: number of queries in the run.
        documents: number of documents of all queries reranked so far.
        scored: how many of these were scored within the budget.
        shown: how many are among the first `top_k`.
        truncated: how many of those shown were truncated.

    Raises:
        InputError: a file cannot be read or parsed; or the run is empty, is not grouped by query,
            repeats a document, or names an id that the other files lack. The message names the
            line.
    """

    def __init__(self, run: Path, queries: Path, documents: Path) -> None:
        self.files = (run, queries, documents)
        with ExitStack() as opened:
            self._run = opened.enter_context(TextFile(run))
            self._queries = opened.enter_context(closing(Texts(queries, "query")))
            self._documents = opened.enter_context(closing(Texts(documents, "document")))
            with closing(Places()) as seen:
                self.count = self._check(seen)
            self._opened = opened.pop_all()
        self.documents = self.scored = self.shown = self.truncated = 0

    def rerank(
        self,
        reranker: Reranker,
        *,
        first: int = 0,
        stop: int | None = None,
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Iterator[list[str]]:
        """Yield the reranked run query by query, as lines without line ends; see `Reranker.rank`.

        Scores are logits, because evaluators sort by score and an activation may create ties.

        Args:
            reranker: ranks each query's documents.
            first: the first query, from 0.
            stop: the query after the last one; None: the end.
            top_k: as the following, see `Reranker.rank`.
            instruction: see there.
            long_documents: see there.
            budget_ms: see there.
        """
        for query, lines in self._groups(first, stop):
            identities = [line.document for line in lines]
            try:
                asked = self._queries[query]
                texts = [self._documents[identity] for identity in identities]
            except KeyError:
                raise InputError(f"{self._run.name} was changed while it was read") from None
            ranking = reranker.rank(
                asked,
                texts,
                top_k=top_k,
                instruction=instruction,
                long_documents=long_documents,
                budget_ms=budget_ms,
            )
            self.documents += len(texts)
            self.scored += ranking.scored_count
            self.shown += len(ranking)
            self.truncated += sum(item.truncated for item in ranking)
            numbers = falling([item.logit for item in ranking])
            yield [
                f"{query} Q0 {identities[item.index]} {rank} {number:{LOGIT}} {TAG}"
                for rank, (item, number) in enumerate(zip(ranking, numbers, strict=True), 1)
            ]

    def queries(self, first: int = 0, stop: int | None = None) -> Iterator[str]:
        """The ids of the queries [first, stop), in order."""
        return (query for query, _ in self._groups(first, stop))

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def _groups(self, first: int, stop: int | None) -> Iterator[tuple[str, Iterator[RunLine]]]:
        groups = groupby(run_lines(self._run), key=lambda line: line.query)
        return islice(groups, first, stop)

    def _check(self, seen: Places) -> int:
        current = None
        documents: set[str] = set()
        for line in run_lines(self._run):
            where = f"{self._run.name}, line {line.number}"
            if line.query != current:
                current = line.query
                documents.clear()
                if current not in self._queries:
                    raise InputError(f"{where}: the queries file lacks query {current!r}")
                if not seen.add(current, line.number):
                    raise InputError(
                        f"{where}: query {current!r} comes back after another one; "
                        "sort the run by query first"
                    )
            if line.document not in self._documents:
                raise InputError(f"{where}: the documents file lacks {line.document!r}")
            if line.document in documents:
                raise InputError(
                    f"{where}: document {line.document!r} stands there twice for query {current!r}"
                )
            documents.add(line.document)
        if current is None:
            raise InputError(f"{self._run.name} is empty: there is no run to rerank")
        return len(seen)
