"""Locks of the operating system on open files, which it releases however their holder ends."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("qrank")


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file; False if another process holds the lock.

    Some network file systems have no locks: a warning says so, and the file counts as locked.
    """
    if sys.platform == "win32":
        import msvcrt

        place = file.tell()
        try:
            # Lock a byte far beyond the content, so that others can read the file.
            file.seek(2**30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            file.seek(place)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _tell(Path(file.name).parent, str(error))
    return True


@cache
def _tell(folder: Path, reason: str) -> None:
    log.warning("%s has no locks (%s): let one process at a time write there", folder, reason)


def lies_at(file: IO[Any], path: Path) -> bool:
    """Whether a path is still this open file: who held its lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
