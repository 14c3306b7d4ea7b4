"""Release pages of memory-mapped files while a runtime reads them once."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGE = 100_000_000
"""Minimum file size in bytes for which this is worthwhile."""

_SECONDS = 0.05
_MADV_PAGEOUT = 21
"""From Linux 5.4 on: pages out without losing content. By the time of the call, a range may have
been unmapped and reused as heap, which MADV_DONTNEED would fill with zeros."""


@contextmanager
def dropping_pages(path: Path) -> Iterator[None]:
    """Page out a mapped file again and again while the context lasts, and once at its end.

    A runtime that repacks weights reads each of them once, and would otherwise hold them twice.
    Nothing is lost: pages that are read again come from the file. Needs Linux 5.4 or newer; does
    nothing elsewhere.
    """
    if sys.platform != "linux" or path.stat().st_size < LARGE:
        yield
        return
    done = threading.Event()

    def work() -> None:
        while not done.wait(_SECONDS):
            _give_back(path)

    thread = threading.Thread(target=work, daemon=True, name="qrank-mapped")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _give_back(path)


def _give_back(path: Path) -> None:
    library = ctypes.CDLL(None)
    for start, end in _ranges(path):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _ranges(path: Path) -> list[tuple[int, int]]:
    """Read-only mappings of a file in memory, as [start, end); they may already be unmapped."""
    name = f" {path.resolve()}"
    lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    places = [line.split()[:2] for line in lines if line.endswith(name)]
    found = [place.split("-") for place, rights in places if "w" not in rights]
    return [(int(start, 16), int(end, 16)) for start, end in found]
