"""One opened target: pairs of texts in, logits out; used by `Reranker` and the server."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from qrank import backends
from qrank.backends.forks import waited_for
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import Manifest
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.errors import TargetError
from qrank.scoring import activation, calibration
from qrank.scoring.calibration import Calibration
from qrank.scoring.deadline import LatencyEstimate, doubling, score_within
from qrank.scoring.encoding import encode_in_steps
from qrank.scoring.inputs import LongDocuments, ModelInput, group_by_prefix
from qrank.scoring.memory import MemoryBudget
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.select.selection import Choice
from qrank.select.targets import Target
from qrank.select.verify import Proof, open_verified


class Engine:
    """Scores pairs with one target of a bundle. Thread-safe.

    After a fork, the child loads the model again on first use, because a runtime's threads do not
    survive a fork. Backend openvino raises an error there; `Reranker` then takes another target.

    Attributes:
        bundle: the target's bundle.
        choice: the target, and how it runs.
        latency: estimate of the scoring time, for time budgets.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: PairTokenizer,
        choice: Choice,
        *,
        max_memory: int | None = None,
        calibrated: bool = False,
    ) -> None:
        """Open a target, and check it against the probes if it has never run here.

        Args:
            bundle: the located bundle.
            tokenizer: the bundle's.
            choice: the target, and how it runs.
            max_memory: as for `Reranker`, in bytes.
            calibrated: as for `Reranker`.

        Raises:
            InputError: `calibrated` is set, and there is no calibration.
            BundleError, TargetError, MissingExtraError: the target does not work here.
        """
        self.bundle = bundle
        self.choice = choice
        self.latency = LatencyEstimate()
        self._tokenizer = tokenizer
        self._max_memory = max_memory
        self._lock = waited_for(threading.RLock())
        self._backend: backends.Backend | None = None
        self._proof: Proof | None = None
        self._users = _Users()
        variant = self.target.variant
        # Raises for a precision of a later qrank: its tolerance is unknown here.
        backends.tolerance(variant.format, variant.precision)
        bundle.provide(variant)
        self._calibration = calibration.load(self.manifest, variant) if calibrated else None
        _living.add(self)
        self.open()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def target(self) -> Target:
        """The variant that runs, and the device."""
        return self.choice.target

    @property
    def format(self) -> str:
        """The format that runs, which names its backend."""
        return self.target.variant.format

    @property
    def threads(self) -> int:
        """CPU threads it may use."""
        return self.choice.options.threads

    @property
    def compute_dtype(self) -> str | None:
        """Data type it computes in; None if the backend has no choice."""
        return None if self._proof is None else self._proof.compute_dtype

    @property
    def kendall(self) -> float:
        """Kendall's tau against the original on the probes, in its compute dtype."""
        proven = None if self._proof is None else self._proof.kendall
        return self.target.variant.fidelity.kendall if proven is None else proven

    @property
    def calibration(self) -> Calibration | None:
        """What `scores` applies instead of the family's activation."""
        return self._calibration

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a pair, including the template's."""
        return self._tokenizer.limit

    def prepare(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        document_tokens: int | None = None,
    ) -> list[ModelInput]:
        """Encode (query, document) pairs for `logits`.

        Args:
            pairs: queries may differ.
            instruction: as for `Reranker.rank`.
            long_documents: as for `Reranker.rank`.
            document_tokens: maximum number of tokens to read of a document. None: what fits.

        Returns:
            One input per pair, or with `chunk` one per part, in the pairs' order.

        Raises:
            InputError: the family takes no instruction, or a document needs more memory than there
                is.
        """
        stops = [len(pairs)]
        steps = self.preparing(pairs, stops, instruction, long_documents, document_tokens)
        return next(steps)

    def preparing(
        self,
        pairs: Sequence[tuple[str, str]],
        stops: Iterable[int],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        document_tokens: int | None = None,
    ) -> Iterator[list[ModelInput]]:
        """As `prepare`, in steps that end at the ascending indices `stops` of `pairs`."""
        asked = (instruction, long_documents, document_tokens)
        for inputs in encode_in_steps(self._tokenizer, pairs, stops, *asked):
            if inputs:
                longest = max(inputs, key=lambda each: each.tokens)
                self._memory.check(longest.tokens, f"document {longest.owner}")
            yield inputs

    def scoring(
        self,
        pairs: Sequence[tuple[str, str]],
        stops: Iterable[int] | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        *,
        seconds: float | None = None,
        always: bool = True,
    ) -> Iterator[tuple[list[ModelInput], Logits]]:
        """Score pairs in order, some at a time.

        Args:
            pairs: queries may differ.
            stops: where each part ends: ascending indices of `pairs`. None: all pairs at once, or
                with `seconds` as `doubling` says.
            instruction: as for `Reranker.rank`.
            long_documents: as for `Reranker.rank`.
            seconds: time for these pairs; see `qrank.scoring.deadline`. None: no limit.
            always: with `seconds`, score the first pair even if the time is up.

        Yields:
            The inputs of some pairs, and their logits.

        Raises:
            InputError, TargetError: as `prepare` and `logits`.
        """
        if stops is None:
            stops = [len(pairs)] if seconds is None else doubling(len(pairs))
        steps = self.preparing(pairs, stops, instruction, long_documents)
        parts: Iterable[list[ModelInput]] = steps
        if seconds is not None:
            parts = score_within(seconds, steps, self.latency, always=always)
        for inputs in parts:
            yield inputs, self.logits(inputs)

    def logits(self, inputs: Sequence[ModelInput]) -> Logits:
        """One logit per input from `prepare`, shape [n]; inputs of several calls may be mixed.

        Raises:
            TargetError: the backend failed, or returned a logit that is not finite; the message
                gives the document's index in its own call.
        """
        logits = np.empty(len(inputs), np.float32)
        with self._in_use() as backend:
            for places, sequences in group_by_prefix(inputs):
                found = np.asarray(backend.logits(sequences), np.float32)
                if found.shape != (len(sequences),):
                    raise TargetError(
                        f"{self.target.name} gave logits of shape {found.shape} for "
                        f"{len(sequences)} inputs"
                    )
                logits[places] = found
        if not np.isfinite(logits).all():
            bad = inputs[int(np.flatnonzero(~np.isfinite(logits))[0])].owner
            raise TargetError(
                f"{self.target.name} gave {logits[~np.isfinite(logits)][0]} for document {bad}; "
                "no ranking can be made of that. Name another variant or device"
            )
        return logits

    def fidelity(self) -> Fidelity:
        """How close its logits are to the original's, on all of the bundle's probes."""
        probes = self.manifest.probes
        with self._in_use() as backend:
            return Fidelity.of(backend.logits(probes.work), probes.logits)

    def scores(self, logits: Logits) -> activation.Scores:
        """Apply the calibration, or else the family's activation, to logits; shape [n]."""
        if self._calibration is not None:
            return self._calibration.apply(logits)
        family = self.manifest.family
        return activation.activate(logits, family.activation, family.temperature)

    def open(self) -> None:
        """Load the model if it is not: after `close`, and in a forked child.

        Raises:
            BundleError, TargetError, MissingExtraError: the target does not work here.
        """
        self._ready()

    def close(self) -> None:
        """Free the model; the next use loads it again.

        Calls running on other threads finish normally; the last of them frees the model. An engine
        that is garbage-collected without `close` frees it too.
        """
        with self._lock:
            backend, self._backend = self._backend, None
            users, self._users = self._users, _Users()
            users.closing = True
            unused = not users.count
        if backend is not None and unused:
            backend.close()

    def _ready(self) -> backends.Backend:
        """The backend of this process, opened and checked if necessary."""
        with self._lock:
            if self._backend is None:
                files = self.target.variant.bytes
                self._memory = MemoryBudget.beside(
                    files, self._max_memory, self.manifest.dimensions
                )
                options = replace(self.choice.options, memory=self._memory)
                self._backend, self._proof = open_verified(
                    self.bundle,
                    self.target,
                    options,
                    least_kendall=self.choice.least_kendall,
                    known=self._proof,
                )
                # Only now, because this query loads the device's driver.
                own = backends.memory(self.target.backend, self.target.device)
                if own is not None:
                    self._memory.move(own, files)
            return self._backend

    @contextmanager
    def _in_use(self) -> Iterator[backends.Backend]:
        """The backend, which is not closed while in use."""
        with self._lock:
            backend, users = self._ready(), self._users
            users.count += 1
        try:
            yield backend
        finally:
            with self._lock:
                users.count -= 1
                last = users.closing and not users.count
            if last:
                backend.close()


class _Users:
    """The number of calls that use a backend, and whether the last of them must close it."""

    def __init__(self) -> None:
        self.count = 0
        self.closing = False


_living: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forget_backends() -> None:
    """In a forked child, drop the parent's backends, so that the next use loads them again.

    A runtime's threads do not survive a fork, but its destructor waits for them. So inherited
    backends are never freed, not even when the child exits.
    """
    for engine in _living:
        engine.latency = LatencyEstimate()
        engine._users = _Users()
        if engine._backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine._backend))
            engine._backend = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_backends)
