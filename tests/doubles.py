"""Backends of another package, found by entry points: those that fail, each in its own way.

Each is an object with the names of a backend module (`qrank.backends`). All but the failures are
`fakes`: quick, so that a choice by speed alone would take them.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import fakes
import numpy as np

from qrank.backends import Backend, Options
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences


class Right:
    """Right and quick: reproduces the probes, and takes no time."""

    FORMATS = ("onnx",)

    @staticmethod
    def version() -> str:
        """See `qrank.backends`."""
        return "right 1.0"

    @staticmethod
    def devices() -> list[str]:
        """See `qrank.backends`."""
        return ["cpu"]

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""
        return fakes.length(folder, variant, device, options)


class Wrong(Right):
    """Gives numbers that are none of the model's."""

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""

        class Random:
            def logits(self, work: Sequences) -> Logits:
                return np.random.default_rng(0).normal(50, 9, len(work)).astype(np.float32)

            def close(self) -> None:
                pass

        return Random()


class Hangs(Right):
    """Opens for ever."""

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""
        while True:
            time.sleep(60)


class Crashes(Right):
    """Ends its process by a null pointer."""

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""
        ctypes.string_at(0)
        raise AssertionError("unreachable")


class CrashesInTheMiddle(Right):
    """Opens, scores nine sequences, and dies of the tenth."""

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""

        class Frail:
            def logits(self, work: Sequences) -> Logits:
                if len(work) >= 10:
                    ctypes.string_at(0)
                return np.zeros(len(work), np.float32)

            def close(self) -> None:
                pass

        return Frail()


class Exits(Right):
    """Ends its process as if all were well."""

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""
        os._exit(0)


class CrashesWhenLookedFor(Right):
    """As `Crashes`, and before anything is opened: as a driver does that lists its devices."""

    @staticmethod
    def devices() -> list[str]:
        """See `qrank.backends`."""
        ctypes.string_at(0)
        raise AssertionError("unreachable")


class Prints(Right):
    """Writes to stdout, as runtimes do: no answer of the child's must be taken from that."""

    @staticmethod
    def devices() -> list[str]:
        """See `qrank.backends`."""
        print('{"version": "printed"}')  # noqa: T201
        return ["cpu"]


class Tires(Right):
    """Works at first, and raises once it is asked in earnest."""

    @staticmethod
    def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        """See `qrank.backends`."""

        class Tired(fakes.Fake):
            calls = 0

            def logits(self, work: Sequences) -> Logits:
                self.calls += 1
                if self.calls > 4:
                    raise MemoryError("no more")
                return super().logits(work)

        return Tired(folder, len)


class Miscounts(Right):
    """Multiplies matrices, and gets it wrong."""

    @staticmethod
    def product(a: Floats, b: Floats, device: str) -> Floats:
        """See `qrank.backends`."""
        return a @ b + np.float32(1)
