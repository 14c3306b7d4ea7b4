"""What to say when something cannot be written."""

from __future__ import annotations

from pathlib import Path


def cannot_write(error: OSError, path: Path, advice: str) -> OSError:
    """The same error, with what could not be written, how much room is there, and what to do.

    An error of writing, other than one of opening, names no file.

    Args:
        error: what was raised.
        path: of the file or folder.
        advice: what to do.
    """
    import shutil  # slow to import, and not needed but here

    try:
        folder = next(place for place in (path, *path.parents) if place.is_dir())
        free = f"; {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there"
    except (OSError, StopIteration):
        free = ""
    return OSError(error.errno, f"{error.strerror or error}{free}; {advice}", str(path))
