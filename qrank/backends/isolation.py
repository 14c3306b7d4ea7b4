"""Backends in a separate process, where a crash or a hang does no harm.

Native libraries and drivers can kill a process without a message, on some CPUs and for some shapes
only. So anything that has never run on this machine runs here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qrank.backends import Options, kind, spec
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import FileRecord, Variant
from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import TargetError
from qrank.system import subprocess_rpc
from qrank.system.subprocess_rpc import Child, CrashError, HangError

_SECONDS = 60.0
_BYTES_A_SECOND = 1e7
_OPERATIONS_A_SECOND = 2e10
"""The lowest speed that does not count as a hang: a machine with one core and other work on it."""

_FACTORS = {"cpu": 1, "tensorrt": 30}
_DRIVER_FACTOR = 5
"""How much longer devices of a kind may take, and the other kinds: GPU and NPU drivers compile for
minutes where a CPU takes seconds, and TensorRT builds an engine for each length of the probes."""


class FatalError(TargetError):
    """A backend that crashed or hung its process."""


def advised(backend: str, device: str) -> bool:
    """Whether a backend should be tried in a separate process before it runs in this one."""
    return not spec(backend).in_process(device) and subprocess_rpc.wanted()


def limit(backend: str, size: int, tokens: int, device: str) -> float:
    """Seconds a backend may take to load a model of `size` bytes and read `tokens` tokens."""
    # A byte is roughly one weight: a multiplication and an addition per token.
    computing = 2 * size * tokens / _OPERATIONS_A_SECOND * spec(backend).patience(device)
    loading = _SECONDS + size / _BYTES_A_SECOND
    return (loading + computing) * _FACTORS.get(kind(device), _DRIVER_FACTOR)


class Worker:
    """A process that runs backends; started at the first request, restarted after it died."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def compute_dtypes(self, backend: str, device: str) -> tuple[str, ...]:
        """The same as `BackendSpec.compute_dtypes`.

        Raises:
            NoChildError: no process can be started here.
            FatalError: the process died or hung.
            QrankError: raised by the backend.
        """
        question = {"do": "compute_dtypes", "backend": backend, "device": device}
        found = self._ask(question, f"looking for {device}", limit(backend, 0, 0, device))
        return tuple(found["compute_dtypes"])

    def logits(
        self,
        folder: Path,
        variant: Variant,
        groups: Sequence[Sequences],
        options: Options,
        *,
        backend: str | None = None,
        device: str = "cpu",
    ) -> list[Logits]:
        """Open a variant, score groups of sequences, and close it.

        Args:
            folder: the bundle's.
            variant: of the bundle.
            groups: to score.
            options: how it runs; `memory` and `family` are not passed on.
            backend: to run it with; None: the one that brings its format.
            device: to run it on.

        Returns:
            Logits of each group, shape [n] each.

        Raises:
            NoChildError, FatalError, QrankError: as for `compute_dtypes`.
        """
        backend = backend or variant.format
        size = sum(p.stat().st_size for p in (folder / variant.folder).rglob("*") if p.is_file())
        where = "this CPU" if device == "cpu" else device
        arithmetic = f" in {options.compute_dtype}" if options.compute_dtype else ""
        question = {
            "do": "logits",
            "folder": str(folder.absolute()),
            "variant": asdict(variant),
            "backend": backend,
            "device": device,
            "options": {
                "threads": options.threads,
                "compute_dtype": options.compute_dtype,
                "max_batch_tokens": options.max_batch_tokens,
                "static_shapes": options.static_shapes,
            },
            "groups": [_plain(group) for group in groups],
        }
        what = f"computing {variant.precision}{arithmetic} on {where}"
        tokens = sum(int(group.lengths.sum()) + len(group.prefix) for group in groups)
        found = self._ask(question, what, limit(backend, size, tokens, device))
        return [np.array(each, np.float32) for each in found["logits"]]

    def close(self, *, kill: bool = False) -> None:
        """End the process; kill it at once if `kill` is set, else if it does not end in time."""
        if self._child is not None:
            self._child.close(kill=kill)
        self._child = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(kill=kind is not None)

    def _ask(self, question: dict[str, Any], what: str, seconds: float) -> dict[str, Any]:
        self._child = self._child or Child(__name__)
        runtime = spec(question["backend"]).runtime or question["backend"]
        try:
            return self._child.ask(question, seconds)
        except CrashError as error:
            self._child = None
            said = f": {error.said}" if error.said else ""
            raise FatalError(f"{runtime} died ({error.how}) {what}{said}") from error
        except HangError as error:
            self._child = None
            raise FatalError(f"{runtime} hung {what}: {error}") from error


def _plain(sequences: Sequences) -> dict[str, Any]:
    segments = sequences.segments
    return {
        "sequences": [ids.tolist() for ids in sequences.ids],
        "segments": None if segments is None else [types.tolist() for types in segments],
        "prefix": sequences.prefix.tolist(),
    }


def _compute_dtypes(backend: str, device: str) -> dict[str, Any]:
    return {"compute_dtypes": list(spec(backend).compute_dtypes(device))}


def _logits(
    folder: str,
    variant: Mapping[str, Any],
    backend: str,
    device: str,
    options: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    fields = {
        **variant,
        "files": {name: FileRecord(**record) for name, record in variant["files"].items()},
        "fidelity": Fidelity(**variant["fidelity"]),
        "ranking": None,  # no backend needs it
    }
    opened = spec(backend).open(Path(folder), Variant(**fields), device, Options(**options))
    try:
        return {"logits": [opened.logits(_sequences(group)).tolist() for group in groups]}
    finally:
        opened.close()


def _sequences(plain: Mapping[str, Any]) -> Sequences:
    segments = plain["segments"]
    return Sequences(
        [np.array(ids, np.int32) for ids in plain["sequences"]],
        None if segments is None else [np.array(types, np.int8) for types in segments],
        np.array(plain["prefix"], np.int32),
    )


def main() -> None:
    """Answer requests in the child process."""
    subprocess_rpc.answer({"compute_dtypes": _compute_dtypes, "logits": _logits})
