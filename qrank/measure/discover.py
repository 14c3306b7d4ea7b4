"""Find backends and devices from child processes, because drivers hang and crash."""

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
    """A `Child`, or a substitute in this process."""

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """See `Child.ask`."""

    def close(self, *, kill: bool = False) -> None:
        """See `Child.close`."""


class _Here:
    """A trial in this process, if no child can be started (in a frozen application, say)."""

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
    """Start a process for a trial; if that is not possible, use this process."""
    if subprocess_rpc.wanted():
        try:
            return Child(worker.__name__).greeted()
        except NoChildError as error:
            log.warning("%s: so this process looks for itself", error)
    return _Here()


@dataclass(frozen=True)
class Device:
    """A device that a backend found, and its options; see `qrank.backends`.

    Attributes:
        name: lower case.
        compute_dtypes: the fastest first; [None] if there is no choice.
        batches: values of `max_batch_tokens`, the backend's default first; may be empty.
        note: a remark for users; often "".
    """

    name: str
    compute_dtypes: list[str] | list[None]
    batches: list[int]
    note: str = ""


@dataclass(frozen=True)
class Found:
    """A backend as found on this machine.

    Attributes:
        backend: its name.
        version: version of its runtime; "" if it cannot be used.
        formats: formats that it reads.
        devices: devices that are present.
        kinds: kinds of devices that it supports, present or not.
        conflict: problem with its installation; often "".
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
    """Survey the backends of a bundle's formats, and those of other packages.

    Args:
        manifest: the bundle's.
        limit: seconds that each may take.
        progress: called with what is being done.
    """
    formats = {variant.format for variant in manifest.variants.values()}
    found = []
    for backend in [name for name in BACKENDS if name in formats] + others():
        progress(f"looking for {backend}")
        found.append(survey(backend, limit))
    return found


def survey(backend: str, limit: float) -> Found:
    """Ask a backend for its version, formats and devices; it may take `limit` seconds."""
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
