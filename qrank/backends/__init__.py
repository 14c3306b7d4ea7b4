"""Backends: token ids in, logits out. One module a format, imported only when asked for.

A backend module offers

    open(folder, variant, device, options) -> Backend
    devices() -> the devices present, lower case
    executions(device) -> arithmetic it can compute in there, fastest first; optional
    version() -> the runtime's name and version

and "package.module:function" names a function of the user's own with `open`'s signature.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from qrank.bundle import Variant
from qrank.errors import TargetError
from qrank.family import Family
from qrank.work import Logits, Work

FORMATS = ("onnx", "openvino", "gguf")
"""Every format that checkpoints are converted to, each with the backend of its name."""

BACKENDS = (*FORMATS, "torch")
"""Every backend; "torch" runs checkpoints as they are."""


def processors() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Options:
    """How a backend runs.

    Attributes:
        threads: CPU threads it may use in all.
        execution: arithmetic to compute in: `fp32`, `bf16` or `fp16`. None: the most exact.
        static_shapes: compile for fixed lengths, as an NPU needs it, where a backend compiles.
        family: of the model; None where a bundle's own files say what is to be known.
    """

    threads: int
    execution: str | None = None
    static_shapes: bool = False
    family: Family | None = None


class Backend(Protocol):
    """Scores sequences with one variant on one device. Safe to call from several threads."""

    def logits(self, work: Work) -> Logits:
        """One raw logit a sequence, in the order of `work`, shape [n]."""

    def close(self) -> None:
        """Free the model. No call may follow."""


class Opener(Protocol):
    """A backend module's `open`, or a user's own."""

    def __call__(
        self, folder: Path, variant: Variant, device: str, options: Options
    ) -> Backend: ...


def module(format: str) -> ModuleType:
    """The backend module of a format."""
    return importlib.import_module(f"qrank.backends.{format}")


def executions(format: str, device: str) -> tuple[str, ...]:
    """Arithmetic that a format's backend can compute in on a device, fastest first.

    Returns:
        Nothing where the backend leaves no choice.
    """
    choices = getattr(module(format), "executions", None)
    return choices(device) if choices else ()


def opener(name: str) -> Opener:
    """The function that opens a backend: a format's, or "package.module:function".

    Raises:
        TargetError: there is no such module or function.
    """
    if ":" not in name:
        return cast(Opener, module(name).open)
    path, _, attribute = name.partition(":")
    try:
        return cast(Opener, getattr(importlib.import_module(path), attribute))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise TargetError(f"no backend {name}: {error}") from error
