"""Tables of pairs in text files: JSONL, CSV and TSV, which may be compressed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qrank.errors import InputError
from qrank.pairs.table import Chunk, Columns, Reject, places, taken, unusable
from qrank.scoring.activation import Scores
from qrank.system.safejson import parse_object
from qrank.system.textfiles import TextFile, compressed

_LONGEST = 1 << 24
"""Characters of a CSV field. Python's own limit is below the length of some documents; without any,
a quotation mark too many would read the rest of the file as one field."""


@dataclass(frozen=True)
class _Raw:
    """A row as it was read.

    Attributes:
        number: its first line.
        text: its lines.
        fields: of CSV and TSV.
        error: why it has no fields.
    """

    number: int
    text: str
    fields: list[str]
    error: str = ""


class _Bad(Exception):  # noqa: N818 (a row, not a program)
    """A row has no usable texts; the message says why."""


class LineTable:
    """See `qrank.pairs.table.Table`; a subclass for each form of rows.

    Args:
        path: the file; what is written is compressed as its suffix says.
        columns: names of the columns.

    Raises:
        InputError: it is no text file; or its header lacks a column, or has the score's already.
    """

    unit = "line"

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self._columns = columns
        self._file = TextFile(path)
        try:
            self._header = self._begin()
        except BaseException:
            self._file.close()
            raise

    def count(self) -> int:
        """See `Table`."""
        return sum(1 for _ in self._rows())

    def chunks(self, size: int, first: int, stop: int | None) -> Iterator[Chunk]:
        """See `Table`."""
        rows = islice(self._rows(), first, stop)
        while some := list(islice(rows, size)):
            good, pairs, rejects = [], [], []
            for raw in some:
                try:
                    row, pair = self._parse(raw)
                except _Bad as error:
                    rejects.append(Reject(raw.number, str(error), raw.text))
                else:
                    good.append(row)
                    pairs.append(pair)
            yield Chunk(len(some), good, pairs, rejects)

    def writer(self, file: IO[bytes]) -> _Writer:
        """See `Table`."""
        return _Writer(self, file)

    def close(self) -> None:
        """See `Table`."""
        self._file.close()

    def _begin(self) -> str:
        """What precedes the rows in the output."""
        return ""

    def _rows(self) -> Iterator[_Raw]:
        """All rows; blank lines are none."""
        raise NotImplementedError

    def _parse(self, raw: _Raw) -> tuple[Any, tuple[str, str]]:
        """A row as `_render` takes it, and its pair.

        Raises:
            _Bad: it has no usable texts.
        """
        raise NotImplementedError

    def _render(self, row: Any, score: float) -> str:
        """A row with its score, and a line end."""
        raise NotImplementedError


class _Writer:
    def __init__(self, table: LineTable, file: IO[bytes]) -> None:
        self._table = table
        self._file = file
        self._packed = compressed(file, table._path.name)
        # JSON can escape half of a surrogate pair, and it is escaped again.
        self._text = io.TextIOWrapper(self._packed, "utf-8", "backslashreplace", newline="\n")
        self._text.write(table._header)

    def write(self, chunk: Chunk, scores: Scores) -> None:
        rows = zip(chunk.good, scores.tolist(), strict=True)
        self._text.writelines(self._table._render(row, score) for row, score in rows)

    def close(self) -> None:
        self._text.flush()
        self._text.detach()
        if self._packed is not self._file:
            self._packed.close()


class Jsonl(LineTable):
    """A JSON object a line."""

    def _rows(self) -> Iterator[_Raw]:
        for number, line in self._file:
            if line.strip():
                yield _Raw(number, line, [])

    def _parse(self, raw: _Raw) -> tuple[dict[str, Any], tuple[str, str]]:
        where = f"{self._file.name}, line {raw.number}"
        try:
            record = parse_object(raw.text, where, "a JSON object")
        except InputError as error:
            raise _Bad(str(error).removeprefix(f"{where}: ")) from None
        query, document, score = self._columns
        if score in record:
            raise taken(where, score)
        for column in (query, document):
            if column not in record:
                there = ", ".join(map(json.dumps, record)) or "none"
                raise _Bad(f'there is no "{column}"; the fields are: {there[:200]}')
        return record, _pair(self._columns, record[query], record[document])

    def _render(self, row: dict[str, Any], score: float) -> str:
        return json.dumps({**row, self._columns.score: score}, ensure_ascii=False) + "\n"


class _Separated(LineTable):
    """Fields below a header with their names."""

    def _begin(self) -> str:
        header = next(self._records(), None)
        if header is None:
            raise InputError(f"{self._file.name} is empty: expected a line with column names")
        if header.error:
            raise InputError(f"{self._file.name}, line {header.number}: {header.error}")
        self._width = len(header.fields)
        self._places = places(self._file.name, header.fields, self._columns)
        return self._joined(header, self._columns.score)

    def _rows(self) -> Iterator[_Raw]:
        return islice(self._records(), 1, None)

    def _parse(self, raw: _Raw) -> tuple[_Raw, tuple[str, str]]:
        if raw.error:
            raise _Bad(raw.error)
        if len(raw.fields) != self._width:
            raise _Bad(f"{len(raw.fields)} fields, where the header has {self._width}")
        return raw, _pair(self._columns, *(raw.fields[place] for place in self._places))

    def _render(self, row: _Raw, score: float) -> str:
        return self._joined(row, repr(score))

    def _records(self) -> Iterator[_Raw]:
        """The header and all rows."""
        raise NotImplementedError

    def _joined(self, row: _Raw, more: str) -> str:
        """A row with one more field."""
        raise NotImplementedError


class Csv(_Separated):
    """Fields between commas; those in quotation marks may have commas and line ends."""

    def _records(self) -> Iterator[_Raw]:
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
        lines: list[str] = []
        first = 0

        def read() -> Iterator[str]:
            nonlocal first
            for number, line in self._file:
                first = first if lines else number
                lines.append(line)
                yield line + "\n"

        # Not strict, it would join two fields where a quotation mark is missing.
        reader = csv.reader(read(), strict=True)
        while True:
            error = ""
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as found:
                fields, error = [], f"no CSV: {found}"
            text = "\n".join(lines)
            lines.clear()
            if fields or error:
                yield _Raw(first, text, fields, error)

    def _joined(self, row: _Raw, more: str) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow([*row.fields, more])
        return out.getvalue()


class Tsv(_Separated):
    """Fields between tabs, without quotation: every line is a row."""

    def _records(self) -> Iterator[_Raw]:
        for number, line in self._file:
            if line:
                yield _Raw(number, line, line.split("\t"))

    def _joined(self, row: _Raw, more: str) -> str:
        return f"{row.text}\t{more}\n"


def _pair(columns: Columns, query: object, document: object) -> tuple[str, str]:
    """The texts of a row.

    Raises:
        _Bad: one is no text.
    """
    for column, value in ((columns.query, query), (columns.document, document)):
        if (reason := unusable(column, value)) is not None:
            raise _Bad(reason)
    assert isinstance(query, str)
    assert isinstance(document, str)
    return query, document
