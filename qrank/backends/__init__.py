"""Backends: token ids in, logits out. One file a backend, imported only when asked for.

A backend's file holds SPEC, a `BackendSpec`, which says all there is to know about it
(`qrank/backends/contract.py`). Another package's backend is found by an entry point of the group
"qrank.backends" that names such an object; it may bring a format of its own. Any function with
`open`'s signature is a backend too, named "package.module:function".
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from typing import TYPE_CHECKING

from qrank.backends.contract import Backend, BackendSpec, Format, Opener, Options, Precision
from qrank.bundle.fidelity import Tolerance
from qrank.errors import TargetError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = ["Backend", "BackendSpec", "Format", "Opener", "Options", "Precision"]

BACKENDS = ("onnx", "openvino", "gguf", "torch")
"""The files of this folder that are backends. "torch" runs checkpoints as they are."""

GROUP = "qrank.backends"
"""The group of entry points that other packages' backends are found by."""

log = logging.getLogger("qrank")


def others() -> list[str]:
    """Names of the backends that other packages bring. They are not imported."""
    return sorted({point.name for point in entry_points(tuple(sys.path))} - set(BACKENDS))


@cache
def entry_points(path: tuple[str, ...]) -> EntryPoints:
    """What is installed on a path: this takes longer than most that asks for it."""
    from importlib import metadata  # here, not above: slow, and most calls need it not

    return metadata.entry_points(group=GROUP)


def spec(name: str) -> BackendSpec:
    """What a backend says about itself.

    Args:
        name: of qrank's own, of another package's, or "package.module:function".

    Raises:
        TargetError: another package's cannot be imported, or there is none of that name.
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
    except Exception as error:  # whatever a module does as it is imported
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
    # As much part of the application as the caller is: so it runs in this process.
    return BackendSpec(function, lambda: name, lambda: ["cpu"], in_process=lambda device: True)


def reads(name: str) -> tuple[str, ...]:
    """The formats that a backend reads: the one it brings, and those of others."""
    found = spec(name)
    return (name, *found.reads) if found.format is not None else found.reads


def format_of(name: str) -> Format | None:
    """A format; None where no backend here brings one of that name."""
    if name not in BACKENDS and name not in others():
        return None
    try:
        return spec(name).format
    except TargetError as error:
        log.warning("%s", error)
        return None


def formats() -> dict[str, Format]:
    """Every format that checkpoints are converted to, other packages' last."""
    found = {name: format_of(name) for name in (*BACKENDS, *others())}
    return {name: format for name, format in found.items() if format and format.converter}


def memory(name: str, device: str) -> int | None:
    """Bytes that a device has for itself; None where it uses the machine's, or nothing tells."""
    return None if device == "cpu" else spec(name).memory(device)


def tolerance(format: str, precision: str) -> Tolerance:
    """What a conversion to a precision of a format may lose.

    Raises:
        TargetError: nobody here knows such a precision.
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
