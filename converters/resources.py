"""What a conversion takes of this machine, asked before it begins: packages, memory, disk."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path

from qrank.backends import FORMATS
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.makers import Maker, Name, converter
from qrank.converters.prebuilt import Importer
from qrank.errors import ConversionError, QrankError
from qrank.system import disk, machine
from qrank.system.extras import DISTRIBUTION

_BYTES = {
    **dict.fromkeys(("fp32", "f32"), 4.0),
    **dict.fromkeys(("fp16", "f16", "bf16"), 2.0),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "int4"), 0.5),
}
"""Bytes a number by precision; 1 in all others."""

_LEAST = 0.5
"""The share of a model's numbers that is surely written: of an output matrix, which may be as large
as the embeddings, only a row is kept."""


def lacking(
    checkpoint: Checkpoint, wanted: Mapping[Name, Maker], folder: Path
) -> dict[Name, QrankError]:
    """Which variants this machine's memory or disk cannot suffice for, and the reasons.

    Args:
        checkpoint: what is converted.
        wanted: in the order they are made in.
        folder: where they are made.

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
        else:
            written += space(checkpoint, name, maker, made=True)
    return found


def space(checkpoint: Checkpoint, name: Name, maker: Maker, *, made: bool = False) -> int:
    """Bytes of disk that a variant takes at least: while it is made, or once it is."""
    if isinstance(maker, Importer):
        return int(_LEAST * maker.bytes)
    format, precision = name
    number = _BYTES.get(precision, 1.0)
    if not made:
        # The graph in fp32; with what comes of it, or before; a file in f16 beside.
        number = {"onnx": 4.0, "openvino": 4.0 + number, "gguf": max(2.0, number)}[format]
    return int(_LEAST * number * checkpoint.parameters())


def _no_memory(checkpoint: Checkpoint, what: str, maker: Maker) -> str | None:
    """Why memory does not suffice: how much it takes, how much there is, what takes less."""
    there = machine.memory()
    if there is None or not maker.MEMORY:
        return None
    whole = 4 * checkpoint.parameters()
    if (takes := whole * maker.MEMORY) <= there:
        return None
    least = {name: whole * converter(name).MEMORY for name in FORMATS}
    fitting = [f"{name} ({n / 1e9:,.1f} GB)" for name, n in least.items() if n <= there]
    return (
        f"{what} takes {takes / 1e9:,.1f} GB of memory or more, and this machine has "
        f"{there / 1e9:,.1f} GB: take "
        + (f"--to {' or '.join(fitting)}, or " if fitting else "")
        + "a larger machine; the bundle runs here where its files fit"
    )


def versions(modules: tuple[str, ...]) -> dict[str, str]:
    """The versions of installed packages, by what pip calls them.

    A module may be another distribution's than the usual: onnxruntime is onnxruntime-gpu's, too.
    """
    found: dict[str, str] = {}
    for module in modules:
        usual = DISTRIBUTION.get(module, module)
        try:
            found[usual] = metadata.version(usual)
        except metadata.PackageNotFoundError:
            others = metadata.packages_distributions().get(module, [])
            found |= {name: metadata.version(name) for name in others}
            if not others:  # of no distribution: built by hand, or in a frozen application
                found[module] = str(getattr(import_module(module), "__version__", "unknown"))
    return found
