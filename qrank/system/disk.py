"""Full or unwritable disks: free space, and one-line errors that name the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)

_NOTHING_LEFT = 2**20
"""Free bytes below which a disk counts as full. Libraries report a failed write in their own words
(numpy: "131072 requested and 25664 written"), after that write has filled the disk."""


def size(count: int) -> str:
    """Bytes in readable form: 1.2 GB, 24.0 MB, 3 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.0f} kB"


def free(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist."""
    import shutil  # here, because it is slow to import and importing qrank does not need it

    return shutil.disk_usage(_existing(path)).free


def writable(path: Path) -> bool:
    """Whether a path can be created, judging by permissions and the mount."""
    return os.access(_existing(path), os.W_OK | os.X_OK)


def no_room(path: Path, needed: int) -> str | None:
    """The disk that has too little space below a path, in one line; None if there is enough.

    Args:
        path: a folder, which need not exist.
        needed: bytes to write.
    """
    if needed <= (there := free(path)):
        return None
    return f"{_disk(path)} has too little space: {size(needed)} needed, {size(there)} free"


def explain(error: BaseException, path: Path, needed: int | None = None) -> str | None:
    """One line for an error caused by a full or unwritable disk; None for any other error.

    Args:
        error: the caught error; the errors it was raised from are checked too.
        path: the file to be written, or its folder.
        needed: total bytes to write, if known.
    """
    if (said := reported(error, path, needed)) is not None:
        return said
    return _full(path, needed) if free(path) < _NOTHING_LEFT else None


def reported(error: BaseException, path: Path, needed: int | None = None) -> str | None:
    """As `explain`, but judging only by the system's own error, not by the free space."""
    for cause in chain(error):
        if not isinstance(cause, OSError):
            continue
        named = Path(cause.filename) if isinstance(cause.filename, str) else _fuller(path)
        if cause.errno == errno.ENOSPC:
            return _full(named, needed)
        if cause.errno == errno.EDQUOT:
            return f"the quota on {_disk(named)} is used up{_wanted(needed, ' ({} needed)')}"
        # Without a file name, the error may come from a socket.
        if cause is error and cause.errno in _REFUSED and cause.filename is not None:
            return f"no access to {named}: {cause.strerror}"
    return None


def cannot_write(error: OSError, path: Path, advice: str) -> OSError:
    """The same error, with the path, the free space there, and advice.

    Unlike an error from opening a file, one from writing has no file name.

    Args:
        error: the error that was raised.
        path: path of the file or folder.
        advice: what to do.
    """
    try:
        room = f"; {size(free(path))} are free there"
    except OSError:
        room = ""
    return OSError(error.errno, f"{error.strerror or error}{room}; {advice}", str(path))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its chain of causes, the newest first."""
    seen: set[int] = set()
    rest: BaseException | None = error
    while rest is not None and id(rest) not in seen:
        seen.add(id(rest))
        yield rest
        rest = rest.__cause__ or (None if rest.__suppress_context__ else rest.__context__)


def _full(path: Path, needed: int | None) -> str:
    return f"{_disk(path)} is full: {_wanted(needed, '{} needed, ')}{size(free(path))} free"


def _fuller(path: Path) -> Path:
    """A path, or the folder for temporary files if that disk is full and the path's is not."""
    import tempfile

    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # none of the usual folders is writable
        return path
    return temporary if free(temporary) < _NOTHING_LEFT <= free(path) else path


def _wanted(needed: int | None, text: str) -> str:
    return "" if needed is None else text.format(size(needed))


def _disk(path: Path) -> str:
    """The disk of a path, named by its mount point."""
    place = _existing(path).resolve()
    # `Path.is_mount` does not support Windows before Python 3.12.
    while not os.path.ismount(place):
        place = place.parent
    return f"the disk at {place}"


def _existing(path: Path) -> Path:
    """A path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
