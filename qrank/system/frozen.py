"""Frozen applications: a program and its modules packed into one file or folder (PyInstaller)."""

from __future__ import annotations

import sys
from pathlib import Path


def frozen() -> bool:
    """Whether this process is one: `sys.executable` is the application, and no Python."""
    return bool(getattr(sys, "frozen", False))


def unpacked(path: Path) -> bool:
    """Whether a file is a copy that this process unpacked for itself and removes at its end.

    An application of one file unpacks itself into a new folder at every start.
    """
    folder = getattr(sys, "_MEIPASS", None)
    if folder is None or not path.is_relative_to(Path(folder).resolve()):
        return False
    return not path.is_relative_to(Path(sys.executable).resolve().parent)
