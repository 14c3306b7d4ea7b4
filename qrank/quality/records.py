"""Line-based files of a collection: texts by id, runs, relevance judgements.

This file is longer than others because all three report a bad line in the same way.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import re
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrank.errors import InputError
from qrank.system.disk import cannot_write
from qrank.system.safejson import parse_object
from qrank.system.textfiles import TextFile

IDS = {
    # MS MARCO's passages also have "docid": the id of their document.
    "document": ("id", "_id", "pid", "passage_id", "docid", "doc_id", "docno"),
    "query": ("id", "_id", "qid", "query_id"),
}
"""Kind of record -> field names of its id: the first that is present counts."""

TEXTS = {
    "document": (
        *("text", "contents", "content", "page_content", "passage", "segment", "body"),
        "document",
    ),
    "query": ("text", "query", "question"),
}
"""Kind of record -> field names of its text: the first that is present and not empty counts."""


def text_of(record: dict[str, Any], kind: str, where: str) -> str:
    """The text of a record, after its title if it has one.

    A record with "_id" is BEIR's, where the title is always prepended. In other records it is not
    if the text already begins with it.

    Args:
        record: a line's JSON object.
        kind: "document" or "query".
        where: file and line, for errors.

    Raises:
        InputError: no text field is a string, or the title is not a string.
    """
    text = None
    for name in TEXTS[kind]:
        found = record.get(name)
        if isinstance(found, str):
            text = found
            if text:
                break
    if text is None:
        raise InputError(f"{where}: {_no_text(record, kind)}")
    title = record.get("title") or ""
    if not isinstance(title, str):
        raise InputError(f'{where}: "title" of the {kind} is {_shown(title)}, not a string')
    if "_id" not in record and text.startswith(title):
        return text
    return f"{title} {text}" if title and text else title or text


def id_of(record: dict[str, Any], kind: str) -> str | None:
    """The id of a record; None if there is no id.

    Raises:
        ValueError: the id is neither a whole number nor a string that UTF-8 can encode; the message
            says what it is instead.
    """
    for name in IDS[kind]:
        if name in record:
            found = record[name]
            break
    else:
        return None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise ValueError(f'"{name}" is {_shown(found)}, not a string or a whole number')
    identity = str(found)
    if not identity.isascii():
        try:
            identity.encode()
        except UnicodeEncodeError:
            raise ValueError(f'"{name}" is {_shown(found)}, half of a surrogate pair') from None
    return identity


def _fields(kind: str) -> frozenset[str]:
    """Fields of a kind of records that are read at all."""
    return frozenset((*IDS[kind], *TEXTS[kind], "title"))


def _no_text(record: dict[str, Any], kind: str) -> str:
    there = [name for name in TEXTS[kind] if name in record]
    if not there:
        return _lacking(record, kind, "text", TEXTS[kind])
    return f'"{there[0]}" of the {kind} is {_shown(record[there[0]])}, not a string'


def _lacking(record: dict[str, Any], kind: str, what: str, names: tuple[str, ...]) -> str:
    there = ", ".join(map(_shown, record)) or "none"
    return (
        f"expected the {what} of a {kind} in one of {', '.join(map(_shown, names))}, "
        f"found the fields {there[:200]}"
    )


def _shown(value: object) -> str:
    """A value for an error message: as JSON, or only the type of an object or a list."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)


@contextmanager
def kept_on_disk() -> Iterator[None]:
    """Writing to a temporary SQLite database (`connect("")`), which spills to disk as it grows.

    Raises:
        OSError: the disk has no space for it.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        import tempfile  # slow to import, and needed only here

        full = OSError(errno.ENOSPC, f"an index of ids cannot be kept: {error}")
        folder = Path(tempfile.gettempdir())
        raise cannot_write(full, folder, "SQLITE_TMPDIR names another folder") from error


class Places:
    """Ids and the place of each in a file; many of them are kept on disk.

    Raises:
        OSError: the disk has no space for them.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE place (id TEXT PRIMARY KEY, start INTEGER)")

    def add(self, identity: str, start: int) -> bool:
        """Add an id with its place; False if the id is already there."""
        try:
            with kept_on_disk():
                self._database.execute("INSERT INTO place VALUES (?, ?)", (identity, start))
        except sqlite3.IntegrityError:
            return False
        return True

    def get(self, identity: str) -> int | None:
        """The place of an id; None if the id is unknown."""
        row = self._database.execute("SELECT start FROM place WHERE id = ?", (identity,)).fetchone()
        return None if row is None else int(row[0])

    def __iter__(self) -> Iterator[str]:
        """Ids, in the order of their places."""
        for (identity,) in self._database.execute("SELECT id FROM place ORDER BY start"):
            yield str(identity)

    def __len__(self) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM place").fetchone()
        return int(count)

    def close(self) -> None:
        """Delete them."""
        self._database.close()


class Texts:
    """Texts of a JSONL or Parquet file by id. Only their places in the file are kept: see `Places`.

    A line or row has an id and a text, under one of the names in `IDS` and `TEXTS`, and an optional
    title: see `text_of`.

    Args:
        path: the file; see `TextFile`.
        kind: kind of its records: "document" or "query".

    Raises:
        InputError: a line is not such an object, or repeats an id; the message names the line.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._kind = kind
        with ExitStack() as opened:
            self._file = opened.enter_context(TextFile(path, _fields(kind)))
            self.name = self._file.name
            """Name of the file in errors."""
            self._places = opened.enter_context(closing(Places()))
            for number, start, line in self._file.places():
                if line.strip():
                    where = f"{self.name}, line {number}"
                    identity = self._parse(line, where)[0]
                    if not self._places.add(identity, start):
                        raise InputError(f"{where}: {kind} {identity!r} stands there twice")
            self._opened = opened.pop_all()

    def __contains__(self, identity: str) -> bool:
        return self._places.get(identity) is not None

    def __getitem__(self, identity: str) -> str:
        start = self._places.get(identity)
        if start is None:
            raise KeyError(identity)
        where = f"{self.name}, {self._kind} {identity!r}"
        found, text = self._parse(self._file.at(start), where)
        if found != identity:
            raise InputError(f"{self.name} was changed while it was read")
        return text

    def __iter__(self) -> Iterator[str]:
        """Ids, in the file's order."""
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def _parse(self, line: str, where: str) -> tuple[str, str]:
        record = parse_object(line, where, f'a {self._kind} as {{"id": …, "text": "…"}}')
        try:
            identity = id_of(record, self._kind)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        if identity is None:
            raise InputError(f"{where}: {_lacking(record, self._kind, 'id', IDS[self._kind])}")
        return identity, text_of(record, self._kind, where)


@dataclass(frozen=True)
class RunLine:
    """A line of a TREC run; `file` and `number` tell where it is, `score` is the column's text."""

    file: str
    number: int
    query: str
    document: str
    score: str

    @property
    def where(self) -> str:
        """File and line, for errors."""
        return f"{self.file}, line {self.number}"

    def number_of_score(self) -> float:
        """The score as a number.

        Raises:
            InputError: it is no finite number.
        """
        try:
            score = float(self.score)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"{self.where}: the score {self.score!r} is no finite number")
        return score

    def repeated(self) -> str:
        """The error of a line whose document its query has already."""
        return (
            f"{self.where}: document {self.document!r} stands there twice for query {self.query!r}"
        )


def run_lines(file: TextFile) -> Iterator[RunLine]:
    """Read a TREC run: query, Q0, document, rank, score, tag.

    Raises:
        InputError: a line has a different number of columns.
    """
    for number, line in file:
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 6:
            raise InputError(
                f"{file.name}, line {number}: expected 6 columns (query Q0 document rank "
                f"score tag), found {len(fields)}"
            )
        yield RunLine(file.name, number, fields[0], fields[2], fields[4])


@dataclass(frozen=True)
class Judgement:
    """A line of relevance judgements."""

    number: int
    query: str
    document: str
    relevance: int


_NAMES = re.compile(
    r"\W?(query|topic|q|t)[-_ ]?(id|no|num|number)?\s.*\s\W?(rel|score|label|grad|judg|rat)\S*",
    re.IGNORECASE,
)
"""A header line: the first column is the query's, the last one the grade's."""


def judgements(file: TextFile) -> Iterator[Judgement]:
    """Read relevance judgements.

    TREC's columns are query, 0, document, relevance; BEIR's are query, document, relevance. Either
    file may begin with a header line. If that contains tabs, tabs separate the columns, as in BEIR;
    otherwise white space does, as in trec_eval.

    Raises:
        InputError: a line has neither form.
    """
    first = True
    tabs = False
    for number, line in file:
        if not line.strip():
            continue
        fields = _between_tabs(line) if tabs else line.split()
        if first:
            first = False
            if _NAMES.fullmatch(line.strip()):
                tabs = "\t" in line
                continue
        relevance = _grade(fields[-1])
        if relevance is None or len(fields) not in (3, 4):
            raise InputError(
                f"{file.name}, line {number}: expected query, 0, document, relevance (TREC) or "
                f"query, document, relevance (BEIR), the last a whole number below 10,000, "
                f"found {line[:60].strip()!r}"
            )
        yield Judgement(number, fields[0], fields[-2], relevance)


def _between_tabs(line: str) -> list[str]:
    """A line's columns, with quotes read as BEIR's reader does."""
    try:
        return next(csv.reader([line], delimiter="\t"))
    except csv.Error:  # a column is too long
        return [line]


def _grade(text: str) -> int | None:
    """A whole number of up to 4 digits, also written as 1.0; None for anything else."""
    found = re.fullmatch(r"([+-]?[0-9]{1,4})(\.0*)?", text.strip())
    return None if found is None else int(found[1])
