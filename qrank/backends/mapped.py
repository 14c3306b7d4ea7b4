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
_MADV_DONTNEED = 4


@contextmanager
def given_back(path: Path) -> Iterator[None]:
    """While the context lasts, and at its end, a mapped file's pages leave memory again and again.

    A runtime that arranges weights anew reads each once, and would hold them twice. Nothing is
    lost: what is read again comes from the file. On Linux alone; elsewhere nothing happens.
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
    name = f" {path.resolve()}"
    library = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        if line.endswith(name) and "w" not in line.split()[1]:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
