"""A table of pairs: rows in, the same rows with a score out; each format implements it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, Protocol

from qrank.errors import InputError
from qrank.scoring.activation import Scores


class Columns(NamedTuple):
    """Names of the columns with the texts, and of the one that is added."""

    query: str = "query"
    document: str = "document"
    score: str = "score"


@dataclass(frozen=True)
class Reject:
    """A row that cannot be scored.

    Attributes:
        number: its first line, from 1, or its row in a Parquet file, from 0.
        reason: why.
        text: its lines; None if its number is enough to find it.
    """

    number: int
    reason: str
    text: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Successive rows of a table.

    Attributes:
        rows: how many there are, rejected ones included.
        good: the others, as the table's writer takes them.
        pairs: their (query, document) pairs.
        rejects: those without usable texts.
    """

    rows: int
    good: Any
    pairs: list[tuple[str, str]]
    rejects: list[Reject]


class Writer(Protocol):
    """Writes rows with their scores."""

    def write(self, chunk: Chunk, scores: Scores) -> None:
        """Write the good rows of a chunk, each with its score."""

    def close(self) -> None:
        """Write what ends the file; the file stays open."""


class Table(Protocol):
    """An opened file of pairs."""

    @property
    def unit(self) -> str:
        """What the number of a `Reject` counts: "line" or "row"."""

    def count(self) -> int:
        """The number of rows."""

    def chunks(self, size: int, first: int, stop: int | None) -> Iterator[Chunk]:
        """The rows [first, stop), `size` at a time; without `stop`, all that follow `first`."""

    def writer(self, file: IO[bytes]) -> Writer:
        """Write the same columns and the score's, in the same format and compression."""

    def close(self) -> None:
        """Close the file."""


def places(name: str, names: Sequence[str], columns: Columns) -> tuple[int, int]:
    """Where the columns with the texts stand among a table's.

    Raises:
        InputError: one is missing or stands there twice, or the score's is there already.
    """
    found = []
    for option, column in (("query", columns.query), ("document", columns.document)):
        if (count := names.count(column)) != 1:
            there = ", ".join(map(json.dumps, names))
            raise InputError(
                f'{name} has {"two columns" if count else "no column"} "{column}"; there are: '
                f"{there[:300]}; name it with --{option}-column"
            )
        found.append(names.index(column))
    if columns.score in names:
        raise taken(name, columns.score)
    return found[0], found[1]


def taken(where: str, column: str) -> InputError:
    """An error: the score would replace a column."""
    return InputError(f'{where} has a "{column}" already; name another with --score-column')


def unusable(column: str, value: object) -> str | None:
    """Why a value is no text to score; None if it is one."""
    if value is None:
        return f'"{column}" is null'
    if isinstance(value, bytes):
        return f'"{column}" is no UTF-8'
    if not isinstance(value, str):
        kind = "an object" if isinstance(value, dict) else json.dumps(value, default=repr)
        kind = "a list" if isinstance(value, list) else kind
        return f'"{column}" is {kind}, not a string'
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return f'"{column}" holds half of a surrogate pair, which is no unicode'
    return None
