"""Files of records a line, as collections come in: texts by id, runs, relevance judgements."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qrank.errors import InputError


class Texts:
    """Texts of a JSONL file by id. Only places in the file are kept, and those on disk.

    A line is {"id" or "_id", "text"}. With "_id" it is BEIR's, whose documents may have a title
    beside the text: it is read first, as BEIR does.

    Args:
        path: the file.
        kind: what its records are called in errors.

    Raises:
        InputError: a line is none, or an id stands there twice; with the line.
    """

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
        start = self._start(identity)
        if start is None:
            raise KeyError(identity)
        self._file.seek(start)
        return self._parse(self._file.readline(), None)[1]

    def __iter__(self) -> Iterator[str]:
        """Ids, in the file's order."""
        for (identity,) in self._places.execute("SELECT id FROM place ORDER BY start"):
            yield str(identity)

    def close(self) -> None:
        """Close the file."""
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
            title = record.get("title") if "id" not in record else None
        except (ValueError, TypeError, KeyError):
            identity = text = title = None
        if not isinstance(identity, str | int) or not isinstance(text, str):
            raise InputError(
                f'{self._path}, line {number}: expected {{"id": …, "text": "…"}}, '
                f"found {line[:60].decode('utf-8', 'replace').strip()!r}"
            )
        return str(identity), f"{title} {text}" if isinstance(title, str) and title else text


@dataclass(frozen=True)
class RunLine:
    """A line of a TREC run; `score` as it stands there."""

    number: int
    query: str
    document: str
    score: str


def run_lines(path: Path) -> Iterator[RunLine]:
    """Read a TREC run: query, Q0, document, rank, score, tag.

    Raises:
        InputError: a line has another number of columns.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 6:
                raise InputError(
                    f"{path}, line {number}: expected 6 columns (query Q0 document rank "
                    f"score tag), found {len(fields)}"
                )
            yield RunLine(number, fields[0], fields[2], fields[4])


@dataclass(frozen=True)
class Judgement:
    """A line of relevance judgements."""

    number: int
    query: str
    document: str
    relevance: int


def judgements(path: Path) -> Iterator[Judgement]:
    """Read relevance judgements.

    Args:
        path: TREC's (query, 0, document, relevance) or BEIR's (query, document, relevance, under a
            line of names).

    Raises:
        InputError: a line is neither.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            try:
                relevance = int(fields[-1])
            except ValueError:
                relevance = None
            if relevance is None and number == 1 and len(fields) == 3:
                continue  # the names
            if relevance is None or len(fields) not in (3, 4):
                raise InputError(
                    f"{path}, line {number}: expected query, 0, document, relevance (TREC) or "
                    f"query, document, relevance (BEIR), found {line[:60].strip()!r}"
                )
            yield Judgement(number, fields[0], fields[-2], relevance)
