"""Backends without a model, through the public seam `backend="package.module:function"`.

This is also the example of the seam: a function with the signature of `qrank.backends.Opener`
that returns an object with `logits` and `close`. A bundle's probes decide whether a backend
computes rightly, for these too: so all but `shifted` give the probes their reference logits, and
anything else a logit that a test can foresee.
"""

from __future__ import annotations

import itertools
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

LONG = 40
"""Tokens from which `nan_when_long` and `inf_when_long` fail."""

recorded: list[Sequences] = []
"""What `recording` was asked, oldest first."""

closed: list[str] = []
"""A word for each backend of this module that was closed."""


class Fake:
    """Reproduces the probes; gives `rule(ids)` for every other sequence."""

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
    """As many as the pair has tokens: longer is better."""
    return Fake(folder, len)


def shortness(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Minus the tokens of the pair: shorter is better."""
    return Fake(folder, lambda ids: -len(ids))


def saturated(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """So large that a sigmoid is 1.0 in float64, and still larger for longer pairs."""
    return Fake(folder, lambda ids: 40.0 + len(ids))


def nan_when_long(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """NaN for pairs of more than LONG tokens."""
    return Fake(folder, lambda ids: float("nan") if len(ids) > LONG else 0.0)


def inf_when_long(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Infinity for pairs of more than LONG tokens."""
    return Fake(folder, lambda ids: float("inf") if len(ids) > LONG else 0.0)


def hair(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Longer is better, by what a float32 of this size can just tell apart."""
    return Fake(folder, lambda ids: 0.123456 + 1e-8 * len(ids))


def slow(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """As `length`; takes half a second to open."""
    time.sleep(0.5)
    return Fake(folder, len)


NAP = 0.005
"""Seconds that `sleepy` takes for each pair."""


class _Sleepy(Fake):
    def logits(self, work: Sequences) -> Logits:
        time.sleep(NAP * len(work))
        return super().logits(work)


def sleepy(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """As `length`; takes NAP for each pair."""
    return _Sleepy(folder, len)


class _Strict(Fake):
    """Notes what no backend may be asked: a call after it was closed, to close during a call."""

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
            time.sleep(0)  # another thread's turn
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
"""What happened to every `strict` backend."""


def strict_length(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """As `length`; counts in `strict` what became of it."""
    return _Strict(folder, len)


class _Recording(Fake):
    def logits(self, work: Sequences) -> Logits:
        recorded.append(work)
        return super().logits(work)


def recording(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """As `length`; keeps what it was asked in `recorded`."""
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
    """The true logits and 3 more: a backend that ranks rightly and computes wrongly."""
    variant = Manifest.load(folder).variants["onnx-int8"]
    return _Shifted(onnx.open(folder, variant, device, options))


SLOW_SECONDS = 0.02
"""That `plodding` takes for a pair."""


class _Plodding(Fake):
    """As a processor: two calls at a time take as long as one after the other."""

    def __init__(self, folder: Path, rule: Callable[[Ids], float]) -> None:
        super().__init__(folder, rule)
        self._processor = threading.Lock()

    def logits(self, work: Sequences) -> Logits:
        with self._processor:
            time.sleep(SLOW_SECONDS * len(work))
        return super().logits(work)


def plodding(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """As `length`; takes SLOW_SECONDS for a pair."""
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
    """As `length`; every tenth call raises what is no QrankError."""
    return _Failing(folder, len)


def queue_breaking(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """As `plodding`; and the server's queue has a bug from its fourth slice on."""
    from qrank.serve import batcher, slices

    asked = itertools.count(1)

    def broken(*arguments: Any) -> list[slices.Share]:
        if next(asked) > 3:
            raise ZeroDivisionError("a bug of the queue's")
        return slices.next_slice(*arguments)

    vars(batcher)["next_slice"] = broken
    return _Plodding(folder, len)
