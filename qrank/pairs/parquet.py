"""Tables of pairs in Parquet files, read in pieces of row groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from qrank.errors import InputError
from qrank.pairs.table import Chunk, Columns, Reject, places, unusable
from qrank.scoring.activation import Scores
from qrank.system.extras import need
from qrank.system.parquet import open_parquet, readable

_GROUP = 1 << 24
"""Bytes of a row group that is written. The writer keeps a description of each in memory: of a
million rows, in groups of a chunk, they took 25 MB."""


class ParquetTable:
    """See `qrank.pairs.table.Table`.

    Args:
        path: the file.
        columns: names of the columns.

    Raises:
        InputError: it is no Parquet file; or it lacks a column, or one does not hold strings, or
            the score's is there already.
        MissingExtraError: pyarrow is not installed.
    """

    unit = "row"

    def __init__(self, path: Path, columns: Columns) -> None:
        self._arrow: Any = need("pyarrow")
        self._parquet: Any = need("pyarrow.parquet")
        self._name = str(path)
        self._columns = columns
        self._file = open_parquet(path, self._name)
        try:
            schema = self._file.schema_arrow
            self._places = places(self._name, schema.names, columns)
            for place in self._places:
                self._see_that_it_holds_strings(schema.field(place))
        except BaseException:
            self.close()
            raise

    def count(self) -> int:
        """See `Table`."""
        return int(self._file.metadata.num_rows)

    def chunks(self, size: int, first: int, stop: int | None) -> Iterator[Chunk]:
        """See `Table`."""
        stop = self.count() if stop is None else min(stop, self.count())
        for start, table in self._tables(size, first, stop):
            yield self._chunk(table, start)

    def writer(self, file: IO[bytes]) -> _Writer:
        """See `Table`."""
        return _Writer(self, file)

    def close(self) -> None:
        """See `Table`."""
        self._file.close()

    def _see_that_it_holds_strings(self, field: Any) -> None:
        types, kind = self._arrow.types, field.type
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = ("is_string", "is_large_string", "is_string_view", "is_null")
        if not any(getattr(types, test)(kind) for test in tests):
            raise InputError(
                f'{self._name}: the column "{field.name}" holds {field.type}, not strings'
            )

    def _tables(self, size: int, first: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Tables of `size` rows, each with the number of its first row; the last may be shorter."""
        groups, skipped = self._groups(first, stop)
        batches = self._file.iter_batches(batch_size=size, row_groups=groups)
        waiting: list[Any] = []
        there, drop = 0, first - skipped
        while first < stop:
            wanted = min(size, stop - first)
            while there < wanted:
                with readable(self._name):
                    batch = next(batches)
                cut = min(drop, batch.num_rows)
                drop -= cut
                waiting.append(batch.slice(cut))
                there += batch.num_rows - cut
            table = self._arrow.Table.from_batches(waiting)
            yield first, table.slice(0, wanted)
            waiting = table.slice(wanted).to_batches()
            there -= wanted
            first += wanted

    def _groups(self, first: int, stop: int) -> tuple[list[int], int]:
        """The row groups with rows of [first, stop), and how many rows precede them."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        ends = np.cumsum([0, *sizes])
        groups = [n for n in range(len(sizes)) if ends[n + 1] > first and ends[n] < stop]
        return groups, int(ends[groups[0]]) if groups else first

    def _chunk(self, table: Any, start: int) -> Chunk:
        pairs: list[tuple[str, str]] = []
        good: list[int] = []
        rejects = []
        columns = [self._texts(table.column(place)) for place in self._places]
        for row, texts in enumerate(zip(*columns, strict=True)):
            named = zip(self._columns[:2], texts, strict=True)
            reason = next(filter(None, (unusable(*each) for each in named)), None)
            if reason is not None:
                rejects.append(Reject(start + row, reason))
            else:
                good.append(row)
                pairs.append(texts)
        rows = table.num_rows
        return Chunk(rows, table.take(good) if rejects else table, pairs, rejects)

    def _texts(self, column: Any) -> list[Any]:
        """A column's values; bytes where they are not UTF-8."""
        try:
            found: list[Any] = column.to_pylist()
        except UnicodeDecodeError:
            found = [self._text(value) for value in column]
        return found

    def _text(self, value: Any) -> object:
        try:
            return value.as_py()
        except UnicodeDecodeError:
            return value.as_buffer().to_pybytes()


class _Writer:
    def __init__(self, table: ParquetTable, file: IO[bytes]) -> None:
        arrow, metadata = table._arrow, table._file.metadata
        self._arrow = arrow
        self._field = arrow.field(table._columns.score, arrow.float64())
        codec = "SNAPPY"
        if metadata.num_row_groups and metadata.num_columns:
            codec = metadata.row_group(0).column(0).compression
        self._writer = table._parquet.ParquetWriter(
            file,
            table._file.schema_arrow.append(self._field),
            compression="NONE" if codec == "UNCOMPRESSED" else codec,
        )
        self._waiting: list[Any] = []

    def write(self, chunk: Chunk, scores: Scores) -> None:
        found = self._arrow.array(scores, self._arrow.float64())
        self._waiting.append(chunk.good.append_column(self._field, found))
        if sum(table.nbytes for table in self._waiting) >= _GROUP:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            # Chunks may have different dictionaries of a column.
            table = self._arrow.concat_tables(self._waiting).unify_dictionaries()
            self._waiting.clear()
            if table.num_rows:
                self._writer.write_table(table, row_group_size=table.num_rows)
