"""Memory of files that a runtime has mapped and read once: given back as it is read."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGE = 100_000_000
"""Bytes from which on it is worth the while."""

_SECONDS = 0.05
_MADV_PAGEOUT = 21
"""Linux 5.4's: pages leave memory, and what they held does not. By the time it is called, a range
may have been unmapped and be somebody's heap, which MADV_DONTNEED would fill with zeros."""


@contextmanager
def dropping_pages(path: Path) -> Iterator[None]:
    """While the context lasts, and at its end, a mapped file's pages leave memory again and again.

    A runtime that arranges weights anew reads each once, and would hold them twice. Nothing is
    lost: what is read again comes from the file. On Linux from 5.4 on; elsewhere nothing happens.
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
    """Where in memory a file is mapped to be read, as [start, end); by now, perhaps no more."""
    name = f" {path.resolve()}"
    lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    places = [line.split()[:2] for line in lines if line.endswith(name)]
    found = [place.split("-") for place, rights in places if "w" not in rights]
    return [(int(start, 16), int(end, 16)) for start, end in found]
