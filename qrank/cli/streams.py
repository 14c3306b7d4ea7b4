"""Standard streams that may be closed, full, without a reader, or in any encoding."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

READER_GONE = 141
"""Exit code when a pipe was closed early: what a shell reports for death by SIGPIPE (13)."""

_NAME = "standard output"


class _Output(io.TextIOWrapper):
    """Standard output: errors name it; if its reader is gone, the command exits silently."""

    def write(self, text: str) -> int:
        with self._told():
            return super().write(text)

    def flush(self) -> None:
        with self._told():
            super().flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python would retry the failed write at exit, and print another error.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EPIPE:
                raise SystemExit(READER_GONE) from None
            raise OSError(error.errno, error.strerror, _NAME) from error


class _Messages(io.TextIOWrapper):
    """Standard error: failed writes are ignored, because messages must not cost the result."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class _Nowhere(io.RawIOBase):
    """Replaces a standard output that was closed before the command started."""

    needed = True
    """Whether writing to it is an error."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        if self.needed:
            raise OSError(errno.EBADF, "it is closed; there is nowhere to print to")
        return len(memoryview(data))  # type: ignore[arg-type]


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Replace standard output and error by the classes above while a command runs.

    Whatever the locale, results that do not go to a terminal are UTF-8, and a lone surrogate is
    escaped as in JSON.
    """
    _take_descriptors()
    given = sys.stdout, sys.stderr
    replaced: list[io.TextIOWrapper] = []
    if sys.stdout is None:
        replaced.append(_Output(io.BufferedWriter(_Nowhere()), "utf-8", "backslashreplace"))
        sys.stdout = replaced[-1]
    elif isinstance(sys.stdout, io.TextIOWrapper):
        encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
        replaced.append(_Output(sys.stdout.buffer, encoding, "backslashreplace"))
        sys.stdout = replaced[-1]
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    elif isinstance(sys.stderr, io.TextIOWrapper):
        buffer, encoding = sys.stderr.buffer, sys.stderr.encoding
        replaced.append(_Messages(buffer, encoding, "backslashreplace", line_buffering=True))
        sys.stderr = replaced[-1]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = given
        for stream in replaced:
            with contextlib.suppress(OSError):
                stream.detach()


def _take_descriptors() -> None:
    """Open the closed ones of descriptors 0, 1 and 2, so that no other file gets their number.

    A native library's output would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def see_to_output(needed: bool) -> None:
    """Check, before any work is done, that standard output is open.

    Args:
        needed: the output is the result; otherwise it may be lost.

    Raises:
        OSError: output is needed, and standard output is closed.
    """
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Nowhere):
        raw.needed = needed
        if needed:
            raise OSError(errno.EBADF, "it is closed; there is nowhere to print to", _NAME)
