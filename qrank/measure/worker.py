"""Survey a backend or try a target in a child process of `qrank.system.subprocess_rpc`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from qrank import backends
from qrank.errors import TargetError
from qrank.reranker import Reranker
from qrank.system import machine
from qrank.system.subprocess_rpc import answer


class Trial:
    """Answers about backends and one opened target; each method returns JSON values."""

    def __init__(self) -> None:
        self._reranker: Reranker | None = None

    def survey(self, backend: str) -> dict[str, Any]:
        """A backend's version, the formats it reads, and its devices here with their options."""
        spec = backends.spec(backend)
        return {
            "version": spec.version(),
            "formats": backends.reads(backend),
            "kinds": spec.kinds,
            "conflict": spec.conflict(),
            "devices": {
                device: {
                    "compute_dtypes": list(spec.compute_dtypes(device)),
                    "batches": list(spec.batches(device)),
                    "note": spec.note(device),
                }
                for device in spec.devices()
            },
        }

    def check(self, backend: str, device: str) -> dict[str, Any]:
        """Error of a matrix product against numpy's; None if the backend has no such check."""
        compute = backends.spec(backend).product
        if compute is None:
            return {"off": None}
        numbers = np.random.default_rng(0)
        a = numbers.standard_normal((24, 64), np.float32)
        b = numbers.standard_normal((64, 40), np.float32)
        found = np.asarray(compute(a, b, device))
        if found.shape != (24, 40) or not np.isfinite(found).all():
            raise TargetError(f"a product of matrices gave {found.shape} of {found.ravel()[:3]}")
        return {"off": float(np.abs(found - a @ b).max())}

    def open(self, model: str, **options: Any) -> dict[str, Any]:
        """Open and check a target (see `Reranker`): seconds, and Kendall's tau on the probes."""
        start = time.perf_counter()
        self._reranker = Reranker(model, **options)
        return {"seconds": time.perf_counter() - start, "kendall": self._reranker.engine.kendall}

    def rank(self, query: str, documents: list[str]) -> dict[str, Any]:
        """Seconds that ranking takes."""
        assert self._reranker is not None
        start = time.perf_counter()
        self._reranker.rank(query, documents)
        return {"seconds": time.perf_counter() - start}

    def fidelity(self) -> dict[str, Any]:
        """The opened target's `Fidelity` to the original, on all probes."""
        assert self._reranker is not None
        return asdict(self._reranker.engine.fidelity())

    def memory(self) -> dict[str, Any]:
        """Peak memory of this process in bytes."""
        return {"bytes": machine.peak_memory()}


def questions() -> dict[str, Callable[..., dict[str, Any]]]:
    """The questions that a new trial answers, by name."""
    trial = Trial()
    names = ("survey", "check", "open", "rank", "fidelity", "memory")
    return {name: getattr(trial, name) for name in names}


def main() -> None:
    """Answer questions; runs in the child."""
    answer(questions())
