"""Backends of another package, found through entry points, most of which fail in some way.

Each is a `BackendSpec`, like those of qrank's own backends. Apart from the failure, they behave
like `fakes`: fast enough that a choice by speed only would select them.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import fakes
import numpy as np

from qrank.backends import Backend, BackendSpec, Options
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences
from qrank.errors import TargetError

RIGHT = BackendSpec(
    open=fakes.length,
    version=lambda: "right 1.0",
    devices=lambda: ["cpu"],
    reads=("onnx",),
)
"""Correct and fast: reproduces the probes and takes no time."""


class _Random:
    def logits(self, sequences: Sequences) -> Logits:
        return np.random.default_rng(0).normal(50, 9, len(sequences)).astype(np.float32)

    def close(self) -> None:
        pass


def _wrong(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    return _Random()


WRONG = replace(RIGHT, open=_wrong)
"""Returns random logits unrelated to the model."""


def _talk(folder: Path, variant: Variant, device: str, options: Options) -> NoReturn:
    host = platform.node()
    raise TargetError(
        f"cannot load {Path.home()}/drivers/gpu.so of {getpass.getuser()}@{host}, nor "
        f"/opt/{host}/private/vendor.so from {folder}"
    )


TALKS = replace(RIGHT, open=_talk)
"""Fails with a message that names the user, the host and folders."""


def _hang(folder: Path, variant: Variant, device: str, options: Options) -> NoReturn:
    while True:
        time.sleep(60)


HANGS = replace(RIGHT, open=_hang)
"""Never finishes opening."""


def _crash(*arguments: object, **named: object) -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


CRASHES = replace(RIGHT, open=_crash)
"""Crashes its process by dereferencing a null pointer."""


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
"""Opens and scores batches of up to nine sequences; crashes on ten or more."""


def _exit(folder: Path, variant: Variant, device: str, options: Options) -> NoReturn:
    os._exit(0)


EXITS = replace(RIGHT, open=_exit)
"""Ends its process with exit code 0."""

CRASHES_WHEN_LOOKED_FOR = replace(RIGHT, devices=_crash)
"""Crashes before anything is opened, like a driver that crashes while listing its devices."""


def _print() -> list[str]:
    print('{"version": "printed"}')  # noqa: T201
    return ["cpu"]


PRINTS = replace(RIGHT, devices=_print)
"""Writes to stdout, as runtimes do; this must not be taken for the child process's answer."""


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
"""Works for the first four calls, then raises."""


def _miscount(a: Floats, b: Floats, device: str) -> Floats:
    found: Floats = a @ b + np.float32(1)
    return found


MISCOUNTS = replace(RIGHT, product=_miscount)
"""Multiplies matrices incorrectly."""

NOTHING = "a text"
"""Not a backend."""
