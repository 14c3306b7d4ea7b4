"""Lock a folder so that only one process writes to it, with a lock of the operating system.

The system releases the lock when its holder ends, however it ends. The lock file holds the process
id of the holder, for people only: containers can share a volume, but not process ids.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qrank.errors import ConversionError
from qrank.system.locks import lies_at, try_lock

LOCK = ".qrank-lock"

_POLL = 0.2
"""Seconds between two attempts to take a lock that another process holds."""

log = logging.getLogger("qrank")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a folder, created if missing; wait while another process holds it."""
    file, path = _acquire(target)
    try:
        yield
    finally:
        if sys.platform == "win32":  # Windows does not remove open files
            file.close()
            with suppress(PermissionError):  # the next process has it open
                path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
            file.close()


def _acquire(target: Path) -> tuple[IO[str], Path]:
    path, told = target / LOCK, False
    if path.is_symlink():  # writing would change the file it points to
        raise ConversionError(f"{path} is a link: remove it")
    while True:
        target.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the previous holder just removed the folder it created
            file = path.open("a+", encoding="utf-8")
            try:
                if try_lock(file) and lies_at(file, path):
                    file.truncate(0)
                    file.write(str(os.getpid()))
                    file.flush()
                    return file, path
                if not told and lies_at(file, path):
                    file.seek(0)
                    holder = file.read().strip()
                    log.warning("waiting for process %s, which converts into %s", holder, target)
                    told = True
            except BaseException:
                file.close()
                raise
            file.close()
        time.sleep(_POLL)
