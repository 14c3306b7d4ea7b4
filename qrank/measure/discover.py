"""Which backends and devices are here, asked in processes of their own: drivers hang and crash."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from qrank.backends import BACKENDS, others
from qrank.bundle.manifest import Manifest
from qrank.errors import QrankError, TargetError
from qrank.measure import worker
from qrank.system import subprocess_rpc
from qrank.system.subprocess_rpc import Child, NoChildError

log = logging.getLogger("qrank")


class Responder(Protocol):
    """A `Child`, or what stands for one."""

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """See `Child.ask`."""

    def close(self, *, kill: bool = False) -> None:
        """See `Child.close`."""


class _Here:
    """A trial in this process, where no Python can be started: in a frozen application."""

    def __init__(self) -> None:
        self._questions = worker.questions()

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        fields = {name: value for name, value in question.items() if name != "do"}
        try:
            return self._questions[question["do"]](**fields)
        except QrankError:
            raise
        except Exception as error:  # a backend may raise anything
            raise TargetError(f"{type(error).__name__}: {error}") from error

    def close(self, *, kill: bool = False) -> None:
        self._questions.clear()


def start() -> Responder:
    """A new process for a trial; this one where none can be started."""
    if subprocess_rpc.wanted():
        try:
            return Child(worker.__name__).greeted()
        except NoChildError as error:
            log.warning("%s: so this process looks for itself", error)
    return _Here()


@dataclass(frozen=True)
class Device:
    """A device that a backend found, and what can be chosen there; see `qrank.backends`.

    Attributes:
        name: lower case.
        compute_dtypes: arithmetic, fastest first; [None] where there is no choice.
        batches: the backend's own first; may be none.
        note: what a user may want to know of it; "" mostly.
    """

    name: str
    compute_dtypes: list[str] | list[None]
    batches: list[int]
    note: str = ""


@dataclass(frozen=True)
class Found:
    """A backend as it is on this machine.

    Attributes:
        backend: its name.
        version: of its runtime; "" where it cannot be used.
        formats: it reads.
        devices: that are present.
        kinds: of devices that it might find elsewhere.
        conflict: what is wrong with how it is installed; "" mostly.
        reason: why it cannot be used; None if it can.
    """

    backend: str
    version: str = ""
    formats: list[str] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    conflict: str = ""
    reason: str | None = None


def surveys(manifest: Manifest, limit: float, progress: Callable[[str], object]) -> list[Found]:
    """Look at the backends of a bundle's formats, and at other packages'.

    Args:
        manifest: the bundle's.
        limit: seconds that each may take.
        progress: told which is looked at.
    """
    formats = {variant.format for variant in manifest.variants.values()}
    found = []
    for backend in [name for name in BACKENDS if name in formats] + others():
        progress(f"looking for {backend}")
        found.append(survey(backend, limit))
    return found


def survey(backend: str, limit: float) -> Found:
    """Look at a backend; it may take `limit` seconds."""
    asked = start()
    try:
        found = asked.ask({"do": "survey", "backend": backend}, limit)
    except QrankError as error:
        asked.close(kill=True)
        return Found(backend, reason=str(error))
    asked.close()
    devices = [
        Device(name, choices["compute_dtypes"] or [None], choices["batches"], choices["note"])
        for name, choices in found["devices"].items()
    ]
    about = {name: found[name] for name in ("version", "formats", "kinds", "conflict")}
    return Found(backend, devices=devices, **about)
