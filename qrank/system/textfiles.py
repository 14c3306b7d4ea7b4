"""Read text files that may be compressed, piped, with a byte order mark, or not quite UTF-8.

`compressed` writes what `TextFile` reads.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, cast

from qrank.errors import InputError
from qrank.system.disk import cannot_write
from qrank.system.parquet import JsonLines

STANDARD_INPUT = Path("-")
"""The path that means standard input."""

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
"""Name suffixes of compressed files."""

_SAMPLE = 1 << 16
"""Bytes at the beginning of a file that decide whether it is text; also the copying block size."""

_IN_MEMORY = 1 << 26
"""Largest copy in bytes, of a pipe or an unpacked file, kept in memory; larger ones go to disk."""

_COMPRESSED = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "bzip2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\x00",),
}
_BOMS = {
    # UTF-32 first, because its mark begins with UTF-16's.
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_BINARY = {
    "a ZIP archive": b"PK\x03\x04",
    "a PDF": b"%PDF-",
    "a Parquet file": b"PAR1",
    "an Arrow file": b"ARROW1",
    "an SQLite database": b"SQLite format 3\x00",
}
_ODD = re.compile("[\x01-\x07\x0e-\x1a\x1c-\x1f\x7f\udc80-\udcff]")
"""Rare in text: control characters (not white space, backspace, escape), undecodable bytes."""

_UNDECODED = re.compile("[\udc80-\udcff]")

log = logging.getLogger("qrank")


class TextFile:
    """The lines of a text file, which can be read repeatedly, even from a pipe.

    Encodings: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one. Lines end in LF
    or CR LF, or in CR if the first 64 KiB have no LF. gzip, bzip2, xz and zstd are recognized by
    their first bytes. A file that cannot be read in place is copied to memory, or to the folder for
    temporary files if it is large. Bytes that are not UTF-8 become U+FFFD, and a warning counts
    them. If a file grows, only the part that existed when it was opened is read.

    Args:
        path: the file, or `STANDARD_INPUT`.
        fields: if there are any, it may be a Parquet file, which is read as JSON objects, a row a
            line, of these columns.

    Raises:
        InputError: it is not text, is damaged, or has a compression that this Python cannot read.
        OSError: it cannot be read, or the copy cannot be written.
    """

    def __init__(self, path: Path, fields: Collection[str] = ()) -> None:
        self._fields = fields
        self.name = "standard input" if path == STANDARD_INPUT else str(path)
        """Name of the file in errors."""
        self._told = False
        with contextlib.ExitStack() as opened:
            self._file, self._begin = self._open(path, opened)
            self._end = self._file.seek(0, os.SEEK_END)
            self._opened = opened.pop_all()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Every line's number, from 1, and its text without the line end."""
        for number, _, text in self.places():
            yield number, text

    def places(self) -> Iterator[tuple[int, int, str]]:
        """Every line's number, its place in the file (see `at`), and its text."""
        bad = first = number = 0
        start = self._begin
        while start < self._end:
            line = self._line(start)
            if not line:  # the file has become shorter
                break
            number += 1
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                bad += len(_UNDECODED.findall(line.decode("utf-8", "surrogateescape")))
                first = first or number
                text = line.decode("utf-8", "replace")
            yield number, start, text.rstrip("\r\n")
            start += len(line)
        if bad and not self._told:
            self._told = True
            log.warning(
                "%s: %s no UTF-8 and read as U+FFFD, the first in line %d",
                self.name,
                "1 byte is" if bad == 1 else f"{bad} bytes are",
                first,
            )

    def at(self, place: int) -> str:
        """The line at a place that `places` returned."""
        return self._line(place).decode("utf-8", "replace").rstrip("\r\n")

    def _line(self, start: int) -> bytes:
        self._file.seek(start)
        return self._file.readline(self._end - start)

    def close(self) -> None:
        """Close the file and delete its copy."""
        self._opened.close()

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, path: Path, opened: contextlib.ExitStack) -> tuple[IO[bytes], int]:
        """A seekable file in UTF-8, and where its text begins."""
        if path != STANDARD_INPUT:
            raw: IO[bytes] = opened.enter_context(path.open("rb"))
        elif sys.stdin is None:
            raise InputError("standard input is closed; nothing can be read from it")
        else:
            raw = sys.stdin.buffer
        file = raw if _lies_still(raw) else self._copied(raw, opened)
        begin = file.tell()
        while True:
            head = file.read(_SAMPLE)
            kind = next((kind for kind, magic in _COMPRESSED.items() if head.startswith(magic)), "")
            if not kind:
                break
            file.seek(begin)
            file, begin = self._unpacked(file, kind, opened), 0
        if self._fields and head.startswith(b"PAR1"):
            file.seek(begin)
            return self._copied(JsonLines(file, self.name, self._fields), opened), 0
        encoding = next((name for name, boms in _BOMS.items() if head.startswith(boms)), "utf-8")
        if encoding == "utf-8":
            self._see_that_it_is_text(head)
            crs = b"\r" in head and b"\n" not in head
            if not crs:
                return file, begin + len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8)
            encoding = "utf-8-sig"
        file.seek(begin)
        return self._recoded(file, encoding, opened), 0

    def _see_that_it_is_text(self, head: bytes) -> None:
        """Reject what perl's -T would: a zero byte, or more than a third odd characters.

        Raises:
            InputError: it is not text; the message says what it seems to be.
        """
        kind = next((kind for kind, magic in _BINARY.items() if head.startswith(magic)), None)
        if kind is None and b"\0" in head:
            kind = "binary, or UTF-16 without a byte order mark"
        if kind is None:
            # The sample may end in the middle of a character: surrogateescape accepts that.
            sample = head.decode("utf-8", "surrogateescape")
            if 3 * len(_ODD.findall(sample)) > len(sample):
                kind = "binary, or in another encoding than UTF-8"
        if kind is not None:
            raise InputError(f"{self.name} is {kind}; expected a text file in UTF-8")

    def _unpacked(self, file: IO[bytes], kind: str, opened: contextlib.ExitStack) -> IO[bytes]:
        reader, damage = _reader(kind, self.name)
        with reader(file) as unpacked:
            return self._copied(unpacked, opened, f"a damaged {kind} file", (EOFError, *damage))

    def _recoded(self, file: IO[bytes], encoding: str, opened: contextlib.ExitStack) -> IO[bytes]:
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        text = io.TextIOWrapper(file, encoding, errors)
        try:
            source = _Encoded(text, errors)
            return self._copied(source, opened, f"damaged {encoding.upper()} text", (UnicodeError,))
        finally:
            text.detach()

    def _copied(
        self,
        source: Any,
        opened: contextlib.ExitStack,
        damaged: str = "",
        damage: tuple[type[Exception], ...] = (),
    ) -> IO[bytes]:
        """A copy of a source; if reading raises `damage`, an InputError says it is `damaged`."""
        import tempfile  # slow to import, and rarely needed

        copy = opened.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))  # noqa: SIM115
        while True:
            try:
                block = source.read(_SAMPLE)
            except damage as error:
                raise InputError(f"{self.name} is {damaged}: {error}") from error
            if not block:
                break
            try:
                copy.write(block)
            except OSError as error:
                folder = Path(tempfile.gettempdir())
                raise cannot_write(error, folder, "TMPDIR names another folder") from error
        copy.seek(0)
        return copy


class _Encoded:
    """Reads a text as UTF-8 in blocks, with LF as every line end."""

    def __init__(self, text: io.TextIOWrapper, errors: str) -> None:
        self._text = text
        self._errors = errors

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode("utf-8", self._errors)


def _lies_still(file: IO[bytes]) -> bool:
    """Whether a file can be read in place: a regular file of known size.

    Files of /proc report size 0, as may other files that are generated when read.
    """
    try:
        found = os.fstat(file.fileno())
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def _reader(kind: str, name: str) -> tuple[Callable[[IO[bytes]], Any], tuple[type[Exception], ...]]:
    """The class that unpacks a kind of compressed file, and the errors it raises for damage."""
    # Each module is imported only if a file needs it.
    if kind == "gzip":
        import gzip
        import zlib

        return lambda file: gzip.GzipFile(fileobj=file, mode="rb"), (gzip.BadGzipFile, zlib.error)
    if kind == "bzip2":
        import bz2

        return bz2.BZ2File, (OSError, ValueError)
    if kind == "xz":
        import lzma

        return lzma.LZMAFile, (lzma.LZMAError,)
    zstd = _zstd(name)
    return zstd.ZstdFile, (zstd.ZstdError,)


def _zstd(name: str) -> Any:
    for package in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(package)
        except ImportError:
            continue
    raise InputError(
        f"{name} is compressed by zstd, which Python reads from 3.14 on, and before with a "
        "package: pip install backports.zstd; or decompress it: zstd -d"
    )


def compressed(file: IO[bytes], name: str) -> IO[bytes]:
    """A file that compresses into another as a name's suffix says; without one of `SUFFIXES`, that.

    Equal content is compressed to equal bytes. Closing it leaves the other open.
    """
    if name.endswith(".gz"):
        import gzip

        # Without a file name and a time.
        return cast(IO[bytes], gzip.GzipFile("", "wb", 6, file, mtime=0))
    if name.endswith(".bz2"):
        import bz2

        return cast(IO[bytes], bz2.BZ2File(file, "wb"))
    if name.endswith(".xz"):
        import lzma

        return cast(IO[bytes], lzma.LZMAFile(file, "wb"))
    if name.endswith(".zst"):
        return cast(IO[bytes], _zstd(name).ZstdFile(file, "wb"))
    return file


def read_lines(path: Path) -> list[str]:
    """All lines of a file: see `TextFile`."""
    with TextFile(path) as file:
        return [text for _, text in file]


def read_text(path: Path) -> str:
    """A small file as a whole, with LF as line ends: see `TextFile`."""
    return "".join(f"{line}\n" for line in read_lines(path))
