"""Backends: token ids in, logits out. One module a format, imported only when asked for.

A backend module offers

    open(folder, variant, device, options) -> Backend
    devices() -> the devices present, lower case
    version() -> the runtime's name and version

and, where it has them,

    compute_dtypes(device) -> arithmetic it can compute in there, fastest first
    batches(device) -> values of `Options.max_batch_tokens` worth trying there, its own choice first
    memory(device) -> bytes that a device other than the CPU has; None where it uses the machine's,
        where nothing tells, and where there is no such device
    product(a, b, device) -> the matrix product, computed there: what `qrank doctor` checks
    DEVICES -> every kind of device it might ever find

Another package's backend is found by an entry point of the group "qrank.backends": a module, or an
object, with the same names, and with FORMATS, the formats it reads. "package.module:function" names
a function of the user's own with `open`'s signature.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from qrank.bundle.family import Family
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import TargetError
from qrank.scoring.memory import MemoryBudget

FORMATS = ("onnx", "openvino", "gguf")
"""Every format that checkpoints are converted to, each with the backend of its name."""

BACKENDS = (*FORMATS, "torch")
"""Every backend; "torch" runs checkpoints as they are."""

RUNTIMES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "gguf": "llama_cpp",
    "torch": "torch",
}
"""The module each of them needs."""

GROUP = "qrank.backends"
"""The group of entry points that other packages' backends are found by."""


@dataclass(frozen=True)
class Options:
    """How a backend runs.

    Attributes:
        threads: CPU threads it may use in all.
        compute_dtype: arithmetic to compute in: `fp32`, `bf16` or `fp16`. None: the most exact.
        max_batch_tokens: padded tokens a batch; None: the backend's own choice. Not every backend
            cuts so.
        static_shapes: compile for fixed lengths, as an NPU needs it, where a backend compiles.
        family: of the model; None where a bundle's own files say what is to be known.
        memory: for batches. The backend cuts them so that they fit, and waits for it.
    """

    threads: int
    compute_dtype: str | None = None
    max_batch_tokens: int | None = None
    static_shapes: bool = False
    family: Family | None = None
    memory: MemoryBudget = field(default_factory=MemoryBudget)


class Backend(Protocol):
    """Scores sequences with one variant on one device. Safe to call from several threads."""

    def logits(self, work: Sequences) -> Logits:
        """One raw logit a sequence, in the order of `work`, shape [n]."""

    def close(self) -> None:
        """Free the model. No call may follow.

        One that is dropped without this must free it by itself, and wait for nothing then.
        """


class Opener(Protocol):
    """A backend module's `open`, or a user's own."""

    def __call__(
        self, folder: Path, variant: Variant, device: str, options: Options
    ) -> Backend: ...


def others() -> list[str]:
    """Names of the backends that other packages bring. They are not imported."""
    from importlib import metadata  # here, not above: slow, and most calls need it not

    return sorted({point.name for point in metadata.entry_points(group=GROUP)} - set(BACKENDS))


def module(name: str) -> Any:
    """The module of a backend, or the object that another package offers in its stead.

    Raises:
        TargetError: another package's cannot be imported, or there is none of that name.
    """
    if name in BACKENDS:
        return importlib.import_module(f"qrank.backends.{name}")
    from importlib import metadata

    points = list(metadata.entry_points(group=GROUP, name=name))
    if not points:
        raise TargetError(f"no backend {name!r}; backends are: {', '.join((*BACKENDS, *others()))}")
    try:
        return points[0].load()
    except Exception as error:  # whatever a module does as it is imported
        raise TargetError(
            f"backend {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def reads(name: str) -> tuple[str, ...]:
    """The formats that a backend reads."""
    return (name,) if name in BACKENDS else tuple(module(name).FORMATS)


def compute_dtypes(name: str, device: str) -> tuple[str, ...]:
    """Arithmetic that a backend can compute in on a device, fastest first.

    Returns:
        Nothing where the backend leaves no choice.
    """
    choices = getattr(module(name), "compute_dtypes", None)
    return tuple(choices(device)) if choices else ()


def batches(name: str, device: str) -> tuple[int, ...]:
    """Values of `Options.max_batch_tokens` worth trying on a device, the backend's own first."""
    choices = getattr(module(name), "batches", None)
    return tuple(choices(device)) if choices else ()


def memory(name: str, device: str) -> int | None:
    """Bytes that a device has for itself; None as a backend module's `memory`."""
    tell = None if device == "cpu" or ":" in name else getattr(module(name), "memory", None)
    found: int | None = tell(device) if tell else None
    return found


def opener(name: str) -> Opener:
    """The function that opens a backend: by its name, or "package.module:function".

    Raises:
        TargetError: there is no such backend, module or function.
    """
    if ":" not in name:
        return cast(Opener, module(name).open)
    path, _, attribute = name.partition(":")
    try:
        return cast(Opener, getattr(importlib.import_module(path), attribute))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise TargetError(f"no backend {name}: {error}") from error
