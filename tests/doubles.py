"""Backends of another package, found by entry points: those that fail, each in its own way.

Each is a `BackendSpec`, as a backend of qrank's own has it. All but the failures are `fakes`:
quick, so that a choice by speed alone would take them.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import fakes
import numpy as np

from qrank.backends import Backend, BackendSpec, Options
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences

RIGHT = BackendSpec(
    open=fakes.length,
    version=lambda: "right 1.0",
    devices=lambda: ["cpu"],
    reads=("onnx",),
)
"""Right and quick: reproduces the probes, and takes no time."""


class _Random:
    def logits(self, sequences: Sequences) -> Logits:
        return np.random.default_rng(0).normal(50, 9, len(sequences)).astype(np.float32)

    def close(self) -> None:
        pass


def _wrong(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    return _Random()


WRONG = replace(RIGHT, open=_wrong)
"""Gives numbers that are none of the model's."""


def _hang(folder: Path, variant: Variant, device: str, options: Options) -> NoReturn:
    while True:
        time.sleep(60)


HANGS = replace(RIGHT, open=_hang)
"""Opens for ever."""


def _crash(*arguments: object, **named: object) -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


CRASHES = replace(RIGHT, open=_crash)
"""Ends its process by a null pointer."""


class _Frail:
    def logits(self, sequences: Sequences) -> Logits:
        if len(sequences) >= 10:
            _crash()
        return np.zeros(len(sequences), np.float32)

    def close(self) -> None:
        pass


def _frail(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    return _Frail()


CRASHES_IN_THE_MIDDLE = replace(RIGHT, open=_frail)
"""Opens, scores nine sequences, and dies of the tenth."""


def _exit(folder: Path, variant: Variant, device: str, options: Options) -> NoReturn:
    os._exit(0)


EXITS = replace(RIGHT, open=_exit)
"""Ends its process as if all were well."""

CRASHES_WHEN_LOOKED_FOR = replace(RIGHT, devices=_crash)
"""As `CRASHES`, and before anything is opened: as a driver does that lists its devices."""


def _print() -> list[str]:
    print('{"version": "printed"}')  # noqa: T201
    return ["cpu"]


PRINTS = replace(RIGHT, devices=_print)
"""Writes to stdout, as runtimes do: no answer of the child's must be taken from that."""


class _Tired(fakes.Fake):
    calls = 0

    def logits(self, sequences: Sequences) -> Logits:
        self.calls += 1
        if self.calls > 4:
            raise MemoryError("no more")
        return super().logits(sequences)


def _tire(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    return _Tired(folder, len)


TIRES = replace(RIGHT, open=_tire)
"""Works at first, and raises once it is asked in earnest."""


def _miscount(a: Floats, b: Floats, device: str) -> Floats:
    found: Floats = a @ b + np.float32(1)
    return found


MISCOUNTS = replace(RIGHT, product=_miscount)
"""Multiplies matrices, and gets it wrong."""

NOTHING = "a text"
"""No backend at all."""
