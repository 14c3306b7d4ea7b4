"""Rerank a TREC run file: as many queries as it holds, in memory for one."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from qrank.errors import InputError
from qrank.reranker import LongDocuments, Reranker

TAG = "qrank"
"""The last column of a run qrank writes."""


def falling(logits: Sequence[float]) -> list[float]:
    """Logits of a ranked list, NaNs at its end falling on by 1 each: evaluators sort by them."""
    scored = [logit for logit in logits if not math.isnan(logit)]
    lowest = scored[-1] if scored else 0.0
    return scored + [lowest - number for number in range(1, len(logits) - len(scored) + 1)]


@dataclass(frozen=True)
class _Line:
    number: int
    query: str
    document: str


class _Texts:
    """Texts of a JSONL file by id. Only places in the file are kept, and those on disk."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        self._kind = kind
        self._file = path.open("rb")
        # A temporary database of SQLite's own, which it spills to disk as it grows.
        self._places = sqlite3.connect("")
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> None:
        self._places.execute("CREATE TABLE place (id TEXT PRIMARY KEY, start INTEGER)")
        start = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                identity = self._parse(line, number)[0]
                try:
                    self._places.execute("INSERT INTO place VALUES (?, ?)", (identity, start))
                except sqlite3.IntegrityError:
                    raise InputError(
                        f"{self._path}, line {number}: {self._kind} {identity!r} stands there twice"
                    ) from None
            start += len(line)

    def __contains__(self, identity: str) -> bool:
        return self._start(identity) is not None

    def __getitem__(self, identity: str) -> str:
        self._file.seek(self._start(identity) or 0)
        return self._parse(self._file.readline(), None)[1]

    def close(self) -> None:
        self._file.close()
        self._places.close()

    def _start(self, identity: str) -> int | None:
        found = self._places.execute("SELECT start FROM place WHERE id = ?", (identity,)).fetchone()
        return None if found is None else int(found[0])

    def _parse(self, line: bytes, number: int | None) -> tuple[str, str]:
        try:
            record = json.loads(line)
            identity = record["id"] if "id" in record else record["_id"]
            text = record["text"]
        except (ValueError, TypeError, KeyError):
            identity = text = None
        if not isinstance(identity, str | int) or not isinstance(text, str):
            raise InputError(
                f'{self._path}, line {number}: expected {{"id": …, "text": "…"}}, '
                f"found {line[:60].decode('utf-8', 'replace').strip()!r}"
            )
        return str(identity), text


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
            self._queries = opened.enter_context(closing(_Texts(queries, "query")))
            self._documents = opened.enter_context(closing(_Texts(documents, "document")))
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
        for query, lines in groupby(self._lines(), key=lambda line: line.query):
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

    def _lines(self) -> Iterator[_Line]:
        with self._run.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                fields = line.split()
                if not fields:
                    continue
                if len(fields) != 6:
                    raise InputError(
                        f"{self._run}, line {number}: expected 6 columns (query Q0 document rank "
                        f"score tag), found {len(fields)}"
                    )
                yield _Line(number, fields[0], fields[2])

    def _check(self, seen: sqlite3.Connection) -> int:
        seen.execute("CREATE TABLE query (id TEXT PRIMARY KEY)")
        count = 0
        current = None
        documents: set[str] = set()
        for line in self._lines():
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
