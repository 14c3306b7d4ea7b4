"""Check before a conversion whether memory and disk suffice; record package versions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

from qrank.backends import formats
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.makers import Maker, Name, converter
from qrank.converters.prebuilt import Importer
from qrank.errors import ConversionError, QrankError
from qrank.system import disk, machine

_LEAST = 0.5
"""The minimum share of a model's weights that is written: only one row is kept of an output matrix,
which may be as large as the embeddings."""


def lacking(
    checkpoint: Checkpoint, wanted: Mapping[Name, Maker], folder: Path, *, together: bool = True
) -> dict[Name, QrankError]:
    """The variants that this machine lacks the memory or disk space for, with the reasons.

    Args:
        checkpoint: the checkpoint to convert.
        wanted: the variants, in the order they are made.
        folder: where they are made.
        together: whether all of them are to be stored, or only one.

    Raises:
        ConversionError: a file of the checkpoint is damaged.
    """
    found: dict[Name, QrankError] = {}
    free, written = disk.free(folder), 0
    for name, maker in wanted.items():
        what = f"converting {checkpoint.name} to {'-'.join(name)}"
        needed = written + space(checkpoint, name, maker)
        if reason := _no_memory(checkpoint, what, maker):
            found[name] = ConversionError(reason)
        elif needed > free:
            found[name] = ConversionError(f"{what}: {disk.no_room(folder, needed)}")
        elif together:
            written += space(checkpoint, name, maker, made=True)
    return found


def space(checkpoint: Checkpoint, name: Name, maker: Maker, *, made: bool = False) -> int:
    """Minimum disk space of a variant in bytes: while it is made, or, with `made`, afterwards."""
    if isinstance(maker, Importer):
        return int(_LEAST * maker.bytes)
    format, precision = name
    known = formats()[format].precision(precision)
    assert known is not None  # checked by `of_checkpoint`
    number = known.bytes if made else converter(format).disk(known.bytes)
    return int(_LEAST * number * checkpoint.parameters())


def _no_memory(checkpoint: Checkpoint, what: str, maker: Maker) -> str | None:
    """Why memory is too small: the need, the size and formats that need less; None if it fits."""
    there = machine.memory()
    if there is None or not maker.MEMORY:
        return None
    whole = 4 * checkpoint.parameters()
    if (takes := whole * maker.MEMORY) <= there:
        return None
    least = {name: whole * converter(name).MEMORY for name in formats()}
    fitting = [f"{name} ({n / 1e9:,.1f} GB)" for name, n in least.items() if 0 < n <= there]
    return (
        f"{what} takes {takes / 1e9:,.1f} GB of memory or more, and this machine has "
        f"{there / 1e9:,.1f} GB: take "
        + (f"--to {' or '.join(fitting)}, or " if fitting else "")
        + "a larger machine; the bundle runs here where its files fit"
    )


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Modules, and the distributions that provide them; reading all of them takes seconds."""
    return metadata.packages_distributions()


def versions(modules: tuple[str, ...]) -> dict[str, str]:
    """The versions of installed packages, by their names in pip.

    A module may come from another distribution: onnxruntime also comes with onnxruntime-gpu.
    """
    found: dict[str, str] = {}
    for module in (name.partition(".")[0] for name in modules):
        try:
            found[module] = metadata.version(module)
        except metadata.PackageNotFoundError:
            others = _distributions().get(module, [])
            found |= {name.replace("_", "-"): metadata.version(name) for name in others}
            if not others:  # no distribution: built by hand, or in a frozen application
                found[module] = str(getattr(import_module(module), "__version__", "unknown"))
    return found
