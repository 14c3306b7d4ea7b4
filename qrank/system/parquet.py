"""Open Parquet files, and read their rows as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qrank.errors import InputError
from qrank.system.extras import need

_BUFFER = 1 << 20
"""Bytes that are read of a column at a time; otherwise a row group's whole column would be."""

_ROWS = 1024
"""Rows in memory at a time."""


def open_parquet(source: Path | IO[bytes], name: str) -> Any:
    """A pyarrow.parquet.ParquetFile, which reads with little memory.

    Raises:
        InputError: it is no Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    parquet: Any = need("pyarrow.parquet")
    with readable(name):
        return parquet.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn pyarrow's errors into one that names the file.

    Raises:
        InputError: it is damaged, or no Parquet file.
    """
    arrow: Any = need("pyarrow")
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        # The system's own have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{name} cannot be read as Parquet: {error}") from error


class JsonLines:
    """Reads a Parquet file as UTF-8: a JSON object a row.

    Args:
        file: the Parquet file.
        name: for errors.
        fields: columns to read, if they are there.
    """

    def __init__(self, file: IO[bytes], name: str, fields: Collection[str]) -> None:
        self._blocks = self._read(open_parquet(file, name), name, fields)

    def read(self, size: int) -> bytes:
        """The next rows, however many bytes they have; none at the end."""
        return next(self._blocks, b"")

    def _read(self, file: Any, name: str, fields: Collection[str]) -> Iterator[bytes]:
        with readable(name):
            columns = [column for column in file.schema_arrow.names if column in fields]
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                lines = (json.dumps(row, default=str) + "\n" for row in batch.to_pylist())
                if content := "".join(lines).encode():
                    yield content
