"""Disks that are full or cannot be written: what is free, and the one line that says which disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)

_NOTHING_LEFT = 2**20
"""Bytes below which a disk counts as full. Libraries that fail to write say so in their own words,
numpy for one in "131072 requested and 25664 written"; what they tried to write has filled it."""


def size(count: int) -> str:
    """Bytes for people: 1.2 GB, 24.0 MB, 3 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.0f} kB"


def free(path: Path) -> int:
    """Bytes that can still be written to the disk of a path, which need not exist."""
    import shutil  # here, not above: slow to import, and importing qrank needs it not

    return shutil.disk_usage(_existing(path)).free


def writable(path: Path) -> bool:
    """Whether something can be made at a path, as far as permissions and the mount tell."""
    return os.access(_existing(path), os.W_OK | os.X_OK)


def no_room(path: Path, needed: int) -> str | None:
    """Which disk is too small for what is to be written below a path; None where it fits.

    Args:
        path: a folder, which need not exist.
        needed: bytes.
    """
    if needed <= (there := free(path)):
        return None
    return f"{_disk(path)} has too little space: {size(needed)} needed, {size(there)} free"


def explain(error: BaseException, path: Path, needed: int | None = None) -> str | None:
    """The one line for an error that a full or unwritable disk caused; None for any other error.

    Args:
        error: as it was caught; what it was raised from is looked at too.
        path: what was to be written, or the folder of it.
        needed: bytes that it takes in all, where that is known.
    """
    if (said := reported(error, path, needed)) is not None:
        return said
    return _full(path, needed) if free(path) < _NOTHING_LEFT else None


def reported(error: BaseException, path: Path, needed: int | None = None) -> str | None:
    """The same by what the system itself said, without a look at the disk."""
    for cause in chain(error):
        if not isinstance(cause, OSError):
            continue
        named = Path(cause.filename) if isinstance(cause.filename, str) else _fuller(path)
        if cause.errno == errno.ENOSPC:
            return _full(named, needed)
        if cause.errno == errno.EDQUOT:
            return f"the quota on {_disk(named)} is used up{_wanted(needed, ' ({} needed)')}"
        # Without a file's name it may be a socket's.
        if cause is error and cause.errno in _REFUSED and cause.filename is not None:
            return f"no access to {named}: {cause.strerror}"
    return None


def cannot_write(error: OSError, path: Path, advice: str) -> OSError:
    """The same error, with what could not be written, how much room is there, and what to do.

    An error of writing, other than one of opening, names no file.

    Args:
        error: what was raised.
        path: of the file or folder.
        advice: what to do.
    """
    try:
        room = f"; {size(free(path))} are free there"
    except OSError:
        room = ""
    return OSError(error.errno, f"{error.strerror or error}{room}; {advice}", str(path))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it came of, the newest first."""
    seen: set[int] = set()
    rest: BaseException | None = error
    while rest is not None and id(rest) not in seen:
        seen.add(id(rest))
        yield rest
        rest = rest.__cause__ or (None if rest.__suppress_context__ else rest.__context__)


def _full(path: Path, needed: int | None) -> str:
    return f"{_disk(path)} is full: {_wanted(needed, '{} needed, ')}{size(free(path))} free"


def _fuller(path: Path) -> Path:
    """A path, or the folder for temporary files where that is what is full."""
    import tempfile

    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # none of the usual ones can be written
        return path
    return temporary if free(temporary) < _NOTHING_LEFT <= free(path) else path


def _wanted(needed: int | None, text: str) -> str:
    return "" if needed is None else text.format(size(needed))


def _disk(path: Path) -> str:
    """The disk of a path, by where it is mounted."""
    place = _existing(path).resolve()
    # Path's own knows no Windows before Python 3.12.
    while not os.path.ismount(place):
        place = place.parent
    return f"the disk at {place}"


def _existing(path: Path) -> Path:
    """A path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
