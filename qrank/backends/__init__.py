"""Backends: token ids in, logits out. One file per backend, imported only when asked for.

A backend's file defines SPEC, a `BackendSpec` that fully describes it
(`qrank/backends/contract.py`). Other packages register a backend with an entry point in the group
"qrank.backends" that names such an object; it may bring its own format. Any function with the
signature of `open` is a backend too, named "package.module:function".
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from typing import TYPE_CHECKING

from qrank.backends.contract import (
    Backend,
    BackendSpec,
    Format,
    Opener,
    Options,
    Precision,
    kind,
)
from qrank.bundle.fidelity import Tolerance
from qrank.errors import TargetError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = ["Backend", "BackendSpec", "Format", "Opener", "Options", "Precision", "kind"]

BACKENDS = ("onnx", "openvino", "gguf", "mlx", "torch")
"""The files of this folder that are backends. "torch" runs unconverted checkpoints."""

GROUP = "qrank.backends"
"""The entry point group in which other packages register their backends."""

log = logging.getLogger("qrank")


def others() -> list[str]:
    """Names of the backends from other packages, without importing them."""
    return sorted({point.name for point in entry_points(tuple(sys.path))} - set(BACKENDS))


@cache
def entry_points(path: tuple[str, ...]) -> EntryPoints:
    """Entry points installed on a path; cached, as the lookup is slower than most callers."""
    from importlib import metadata  # imported here: it is slow, and most calls do not need it

    return metadata.entry_points(group=GROUP)


def spec(name: str) -> BackendSpec:
    """The `BackendSpec` of a backend.

    Args:
        name: one of qrank's backends, one of another package's, or "package.module:function".

    Raises:
        TargetError: there is no backend of that name, or its package cannot be imported or names
            something that is not a `BackendSpec`.
    """
    if name in BACKENDS:
        found: BackendSpec = importlib.import_module(f"qrank.backends.{name}").SPEC
        return found
    return _users_own(name) if ":" in name else _other(name)


def _other(name: str) -> BackendSpec:
    points = [point for point in entry_points(tuple(sys.path)) if point.name == name]
    if not points:
        raise TargetError(f"no backend {name!r}; backends are: {', '.join((*BACKENDS, *others()))}")
    try:
        found = points[0].load()
    except Exception as error:  # importing a module can raise anything
        raise TargetError(
            f"backend {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, BackendSpec):
        raise TargetError(
            f"backend {name} is {points[0].value}, which is {type(found).__name__} and not a "
            "qrank.backends.BackendSpec"
        )
    return found


def _users_own(name: str) -> BackendSpec:
    path, _, attribute = name.partition(":")
    try:
        function: Opener = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise TargetError(f"no backend {name}: {error}") from error
    # The function is part of the user's application, so it runs in this process.
    return BackendSpec(function, lambda: name, lambda: ["cpu"], in_process=lambda device: True)


def reads(name: str) -> tuple[str, ...]:
    """The formats that a backend reads: its own, if it has one, and other backends' formats."""
    found = spec(name)
    return (name, *found.reads) if found.format is not None else found.reads


def format_of(name: str) -> Format | None:
    """The format of this name; None if no installed backend brings it."""
    if name not in BACKENDS and name not in others():
        return None
    try:
        return spec(name).format
    except TargetError as error:
        log.warning("%s", error)
        return None


def formats() -> dict[str, Format]:
    """Every format that checkpoints can be converted to, those of other packages last."""
    found = {name: format_of(name) for name in (*BACKENDS, *others())}
    return {name: format for name, format in found.items() if format and format.converter}


def memory(name: str, device: str) -> int | None:
    """Bytes of a device's own memory; None if it uses the machine's or the size is unknown."""
    return None if device == "cpu" else spec(name).memory(device)


def tolerance(format: str, precision: str) -> Tolerance:
    """The tolerance of a conversion to a precision of a format.

    Raises:
        TargetError: the format or the precision is unknown.
    """
    found = format_of(format)
    known = found.precision(precision) if found is not None else None
    if known is None:
        names = [] if found is None else [each.name for each in found.precisions]
        raise TargetError(
            f"this qrank knows no precision {precision!r} (of {format}-{precision}); known are: "
            f"{', '.join(names) or 'none'}. A later version may"
        )
    return known.tolerance
