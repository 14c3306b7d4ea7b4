"""Backends without a model, used through the public option `backend="package.module:function"`.

This is also the example for that option: a function with the signature of `qrank.backends.Opener`
that returns an object with `logits` and `close`. A bundle's probes check the logits of every
backend, including these, so all but `shifted` return the reference logits for the probes, and a
predictable logit for any other sequence.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qrank.backends import Backend, Options, onnx
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Ids, Logits, Sequences
from qrank.errors import TargetError

LONG = 40
"""`nan_when_long` and `inf_when_long` fail for pairs of more tokens than this."""

recorded: list[Sequences] = []
"""The work that `recording` received, oldest first."""

closed: list[str] = []
"""The kind of each backend of this module that was closed."""


class Fake:
    """Reproduces the probes; returns `rule(ids)` for every other sequence."""

    def __init__(self, folder: Path, rule: Callable[[Ids], float]) -> None:
        probes = Manifest.load(folder).probes
        sequences = [sequence.tobytes() for sequence in probes.work.ids]
        self._known = dict(zip(sequences, probes.logits.tolist(), strict=True))
        self._rule = rule

    def logits(self, work: Sequences) -> Logits:
        """See `qrank.backends.Backend`."""
        values = [self._known.get(ids.tobytes(), self._rule(ids)) for ids in work.ids]
        return np.array(values, np.float32)

    def close(self) -> None:
        """See `qrank.backends.Backend`."""
        closed.append("fake")


def ties(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """The same logit for every pair."""
    return Fake(folder, lambda ids: 0.25)


def length(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """The pair's number of tokens: longer is better."""
    return Fake(folder, len)


def shortness(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Minus the pair's number of tokens: shorter is better."""
    return Fake(folder, lambda ids: -len(ids))


def scrambled(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """One of 97 logits, which says nothing about the pair; the same for the same pair."""
    return Fake(folder, lambda ids: int(ids.astype(np.int64) @ np.arange(1, len(ids) + 1)) % 97)


def saturated(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Logits so large that their sigmoid is 1.0 in float64; larger for longer pairs."""
    return Fake(folder, lambda ids: 40.0 + len(ids))


def nan_when_long(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """NaN for pairs of more than LONG tokens."""
    return Fake(folder, lambda ids: float("nan") if len(ids) > LONG else 0.0)


def inf_when_long(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Infinity for pairs of more than LONG tokens."""
    return Fake(folder, lambda ids: float("inf") if len(ids) > LONG else 0.0)


def hair(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Longer is better, by a difference that float32 can just resolve at this magnitude."""
    return Fake(folder, lambda ids: 0.123456 + 1e-8 * len(ids))


def slow(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but takes half a second to open."""
    time.sleep(0.5)
    return Fake(folder, len)


def refusing(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Cannot be opened, and says what it was given."""
    memory = (options.memory._size or 0) / 2**20
    raise TargetError(f"{options.threads} threads and {memory:.0f} MB are not enough")


NAP = 0.005
"""Seconds that `sleepy` takes for each pair."""


class _Sleepy(Fake):
    def logits(self, work: Sequences) -> Logits:
        time.sleep(NAP * len(work))
        return super().logits(work)


def sleepy(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but takes NAP seconds for each pair."""
    return _Sleepy(folder, len)


class _Deadly(Fake):
    def logits(self, work: Sequences) -> Logits:
        if any(len(ids) > 4 * LONG for ids in work.ids if ids.tobytes() not in self._known):
            os._exit(1)
        return super().logits(work)


def deadly(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but ends its process at a pair of more than four times LONG tokens."""
    return _Deadly(folder, len)


class _Strict(Fake):
    """Counts forbidden uses of a backend: a call after it was closed, or a close during a call."""

    def __init__(self, folder: Path, rule: Callable[[Ids], float]) -> None:
        super().__init__(folder, rule)
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()
        strict["opened"] += 1

    def logits(self, work: Sequences) -> Logits:
        with self._lock:
            strict["used when closed"] += self._closed
            self._users += 1
        try:
            time.sleep(0)  # let another thread run
            return super().logits(work)
        finally:
            with self._lock:
                self._users -= 1

    def close(self) -> None:
        with self._lock:
            strict["closed in use"] += self._users > 0
            strict["closed twice"] += self._closed
            self._closed = True
        strict["closed"] += 1


strict: Counter[str] = Counter()
"""Counts of events over all `strict_length` backends."""


def strict_length(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but counts in `strict` how it was used."""
    return _Strict(folder, len)


class _Recording(Fake):
    def logits(self, work: Sequences) -> Logits:
        recorded.append(work)
        return super().logits(work)


def recording(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but appends the work it receives to `recorded`."""
    return _Recording(folder, len)


class _Forgetful(Fake):
    def logits(self, work: Sequences) -> Logits:
        logits = super().logits(work)
        return logits if len(logits) < 100 else logits[:-1]


def forgetful(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """One logit too few for 100 pairs or more."""
    return _Forgetful(folder, len)


class _Shifted:
    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    def logits(self, work: Sequences) -> Logits:
        return self._inner.logits(work) + np.float32(3)

    def close(self) -> None:
        closed.append("shifted")
        self._inner.close()


def shifted(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """The model's logits plus 3: a backend with the right ranking but wrong logits."""
    variant = Manifest.load(folder).variants["onnx-int8"]
    return _Shifted(onnx.open(folder, variant, device, options))


SLOW_SECONDS = 0.02
"""Seconds that `plodding` takes for each pair."""


class _Plodding(Fake):
    """Behaves like a single processor: concurrent calls take as long as consecutive ones."""

    def __init__(self, folder: Path, rule: Callable[[Ids], float]) -> None:
        super().__init__(folder, rule)
        self._processor = threading.Lock()

    def logits(self, work: Sequences) -> Logits:
        with self._processor:
            time.sleep(SLOW_SECONDS * len(work))
        return super().logits(work)


def plodding(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but takes SLOW_SECONDS for each pair, one call at a time."""
    return _Plodding(folder, len)


class _Failing(Fake):
    def __init__(self, folder: Path, rule: Callable[[Ids], float]) -> None:
        super().__init__(folder, rule)
        self._calls = 0

    def logits(self, work: Sequences) -> Logits:
        self._calls += 1
        if self._calls % 10 == 0:
            raise RuntimeError("every tenth call fails")
        return super().logits(work)


def failing(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `length`, but every tenth call raises an error that is not a QrankError."""
    return _Failing(folder, len)


def queue_breaking(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Like `plodding`, but the server's queue raises from its fourth slice on."""
    from qrank.serve import batcher, slices

    asked = itertools.count(1)

    def broken(*arguments: Any) -> list[slices.Share]:
        if next(asked) > 3:
            raise ZeroDivisionError("a bug of the queue's")
        return slices.next_slice(*arguments)

    vars(batcher)["next_slice"] = broken
    return _Plodding(folder, len)
