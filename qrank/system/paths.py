"""Folders that qrank writes to on its own, and atomic writes of files."""

from __future__ import annotations

import logging
import os
import threading
from functools import cache
from pathlib import Path

log = logging.getLogger("qrank")


@cache
def cache_folder() -> Path | None:
    """The cache folder, created if needed: $QRANK_CACHE, or the platform's.

    Returns:
        The folder; None if it is not writable (a read-only home, say). Everything still works
        then, but nothing is cached, and one warning says so.
    """
    # Imported here because both are slow to import and importing qrank needs neither.
    import tempfile

    import platformdirs

    named = os.environ.get("QRANK_CACHE")
    folder = Path(named).absolute() if named else platformdirs.user_cache_path("qrank")
    try:
        if not folder.is_absolute():
            # Without a home folder "~" is not expanded: do not create a folder of that name.
            raise OSError(f"{folder} is not an absolute path")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("no cache: %s; set QRANK_CACHE to a writable folder to start faster", error)
        return None


def data_folder() -> Path:
    """Folder for data the user made: $QRANK_DATA, or the platform's. It need not exist."""
    import platformdirs

    named = os.environ.get("QRANK_DATA")
    return Path(named).absolute() if named else platformdirs.user_data_path("qrank")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically: readers see either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
