"""Rerank a TREC run file of any number of queries, with only one of them in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby, islice
from pathlib import Path

from qrank.cascade import Cascade
from qrank.errors import InputError
from qrank.quality.fusion import FusedRun
from qrank.quality.records import Places, RunLine, Texts, run_lines
from qrank.reranker import Reranker
from qrank.scoring.inputs import LongDocuments
from qrank.scoring.ranking import Ranking
from qrank.system.textfiles import STANDARD_INPUT, SUFFIXES, TextFile

TAG = "qrank"
"""The last column of a run qrank writes."""

LOGIT = ".9g"
"""Format of a logit: different float32 values are written differently."""


def falling(ranking: Sequence[Ranking]) -> list[float]:
    """Logits of a ranked list, so that they fall: evaluators sort by them.

    Documents of another stage of a cascade follow 1 below the lowest of the stage before them, at
    their own distances; unscored documents continue in steps of -1.
    """
    numbers: list[float] = []
    for (scored, _), group in groupby(ranking, key=lambda item: (item.scored, item.stage)):
        items = list(group)
        lowest = numbers[-1] if numbers else 0.0
        if scored:
            shift = lowest - 1 - items[0].logit if numbers else 0.0
            numbers += [item.logit + shift for item in items]
        else:
            numbers += [lowest - place for place in range(1, len(items) + 1)]
    return numbers


def _name(run: Path) -> str:
    """The file name of a run, without suffixes of compression."""
    name = "run.trec" if run == STANDARD_INPUT else run.name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


class RunReranker:
    """Reranks a run, after checking all of it before anything is scored.

    Args:
        run: TREC run file: query, Q0, document, rank, score, tag; grouped by query. Several are
            fused: see `qrank.quality.fusion`.
        queries: JSONL with id and text: see `Texts`.
        documents: JSONL with id and text: see `Texts`.

    Attributes:
        files: the arguments, as one list.
        name: file name of the run without suffixes of compression, or `rrf.trec`.
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

    def __init__(self, run: Path | Sequence[Path], queries: Path, documents: Path) -> None:
        runs = [run] if isinstance(run, Path) else list(run)
        self.files = (*runs, queries, documents)
        self.name = _name(runs[0]) if len(runs) == 1 else "rrf.trec"
        with ExitStack() as opened:
            self._run: TextFile | FusedRun
            self._run = TextFile(runs[0]) if len(runs) == 1 else FusedRun(runs)
            opened.callback(self._run.close)
            self._queries = opened.enter_context(closing(Texts(queries, "query")))
            self._documents = opened.enter_context(closing(Texts(documents, "document")))
            with closing(Places()) as seen:
                self.count = self._check(seen)
            self._opened = opened.pop_all()
        self.documents = self.scored = self.shown = self.truncated = 0

    def rerank(
        self,
        reranker: Reranker | Cascade,
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
            numbers = falling(ranking)
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
        groups = groupby(self._lines(), key=lambda line: line.query)
        return islice(groups, first, stop)

    def _lines(self) -> Iterator[RunLine]:
        return run_lines(self._run) if isinstance(self._run, TextFile) else iter(self._run)

    def _check(self, seen: Places) -> int:
        current = None
        documents: set[str] = set()
        for line in self._lines():
            where = line.where
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
                raise InputError(line.repeated())
            documents.add(line.document)
        if current is None:
            raise InputError(f"{self._run.name} is empty: there is no run to rerank")
        return len(seen)
