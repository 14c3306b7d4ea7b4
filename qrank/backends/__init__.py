"""Backends: token ids in, logits out. One module a format, imported only when asked for.

A backend module offers

    open(folder, variant, device, options) -> Backend
    devices() -> the devices present, lower case
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
from qrank.work import Logits, Work

FORMATS = ("onnx", "gguf")
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
    """What a backend may use: `threads` CPU threads in all."""

    threads: int


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
