"""Type and range checks for arguments of the public API, made before anything is loaded.

A function returns the argument as a plain Python value, if anything, or raises an InputError that
names the argument, the value given and the values allowed.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from qrank.bundle.opened import Bundle
from qrank.errors import InputError
from qrank.system.machine import processors

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)(?:I?B)?")


def size(text: str) -> int:
    """Parse a human-readable size into bytes: 4G, 512 MiB, 1.5gb; units are powers of 1024."""
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None:
        raise InputError(f"{text!r} is no size; give one like 512M or 4G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def memory(name: str, value: object) -> int | None:
    """Bytes, 1 or more, as a number or a `size`; or None."""
    try:
        return whole(name, size(value) if isinstance(value, str) else value, 1)
    except InputError:
        raise wrong(name, value, "bytes, 1 or more, or a size like 512M or 4G, or None") from None


def whole(name: str, value: object, least: int) -> int | None:
    """A whole number of at least `least`; or None. NumPy's integers count as whole numbers."""
    if value is None:
        return None
    # Python accepts True as 1; here it is a mistake.
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with suppress(TypeError):  # an array: it has the method but is not a number
            if (found := operator.index(value)) >= least:
                return found
    raise wrong(name, value, f"a whole number, {least} or more, or None")


def threads(value: object) -> int:
    """The argument `threads`; None: every CPU this process may use."""
    return whole("threads", value, 1) or processors()


def number(
    name: str,
    value: object,
    wanted: str,
    fits: Callable[[float], bool] = math.isfinite,
    *,
    none: bool = True,
) -> float | None:
    """A finite number that `fits` accepts; or None, if `none` allows it."""
    if value is None and none:
        return None
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        found = float(value)
        if math.isfinite(found) and fits(found):
            return found
    raise wrong(name, value, f"{wanted}, or None" if none else wanted)


def function(name: str, value: object) -> None:
    """Something that can be called."""
    if not callable(value):
        raise wrong(name, value, "a function")


def text(name: str, value: object) -> str | None:
    """A string; or None."""
    if value is None or isinstance(value, str):
        return value
    raise wrong(name, value, "a string, or None")


def device(value: object) -> str | None:
    """The argument `device`, or None; the first of several cards has no number: `cuda`."""
    found = text("device", value)
    return found and found.removesuffix(":0")


def place(name: str, value: object, wanted: str) -> str | Path:
    """A name, or a path."""
    if isinstance(value, os.PathLike) and isinstance(path := os.fspath(value), str):
        return Path(path)
    if isinstance(value, str) and value:
        return value
    raise wrong(name, value, wanted)


def model(value: object) -> str | Path | Bundle:
    """A user's name for a model, or a `Bundle` from `qrank.bundle.locate`."""
    if isinstance(value, Bundle):
        return value
    return place("model", value, "a bundled name, a bundle's folder or a hub id")


def flag(name: str, value: object) -> bool:
    """True or False."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise wrong(name, value, "True or False")


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """One of several strings."""
    if not isinstance(value, str) or value not in known:
        raise wrong(name, value, f"one of {', '.join(map(repr, known))}")


def wrong(name: str, value: object, wanted: str) -> InputError:
    """The error for a wrong value; a long value is shortened."""
    return InputError(f"{name} is {reprlib.repr(value)}; give {wanted}")
