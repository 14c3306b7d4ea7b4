"""A folder that one process at a time may write, held by a lock of the operating system.

The system frees it when its holder ends, however that ends. The file's text, the holder's process,
is for people: containers share volumes, and not process numbers.
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

LOCK = ".qrank-lock"

_POLL = 0.2
"""Seconds between two looks at a lock that another process holds."""

log = logging.getLogger("qrank")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a folder, made if need be; wait for the process that holds it."""
    file, path = _acquire(target)
    try:
        yield
    finally:
        if sys.platform == "win32":  # which removes no file that is open
            file.close()
            with suppress(PermissionError):  # the next one has it
                path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
            file.close()


def _acquire(target: Path) -> tuple[IO[str], Path]:
    path, told = target / LOCK, False
    if path.is_symlink():  # to a file of somebody's, which would be written to
        raise ConversionError(f"{path} is a link: remove it")
    while True:
        target.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its holder has just removed what it had made
            file = path.open("a+", encoding="utf-8")
            try:
                if _try_lock(file) and _same(file, path):
                    file.truncate(0)
                    file.write(str(os.getpid()))
                    file.flush()
                    return file, path
                if not told and _same(file, path):
                    file.seek(0)
                    holder = file.read().strip()
                    log.warning("waiting for process %s, which converts into %s", holder, target)
                    told = True
            except BaseException:
                file.close()
                raise
            file.close()
        time.sleep(_POLL)


def _same(file: IO[str], path: Path) -> bool:
    """Whether a path still leads to an open file: the holder before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(file: IO[str]) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            # Behind the text, so that others can read who holds it.
            file.seek(2**20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): convert into it once at a time", file.name, error)
    return True
