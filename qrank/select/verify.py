"""A target on this machine: opened, in the fastest arithmetic that computes rightly here.

What has never run here is held against the bundle's probes first, in a process of its own where a
native library could end this one (`qrank.backends.isolation`). What came of it is remembered.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from qrank.backends import Backend, Options, isolation, spec, tolerance
from qrank.backends.isolation import FatalError
from qrank.bundle.fidelity import Fidelity, here
from qrank.bundle.manifest import Probes
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import QrankError, TargetError
from qrank.select.targets import Target
from qrank.system import cache
from qrank.system.subprocess_rpc import NoChildError

CONVERTED_IN = "fp32"
"""What conversions are proven in, where there is a choice."""

_PROBE_TOKENS = 1024
"""Of the shortest probes, beside the longest one: what a first start can wait for."""

_FAILURE_SECONDS = 24 * 3600
"""How long a failure is remembered: a machine that was busy, or mended, gets another chance."""

_KIND = "proofs"

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Proof:
    """What came of holding a target against its bundle's probes on this machine.

    Attributes:
        compute_dtype: arithmetic it computes in; None where the backend leaves no choice.
        kendall: Kendall's tau against the original, of arithmetic that the conversion was not
            proven in; None elsewhere: the manifest says it then.
        reason: why the target cannot be used; None if it can.
        rejected: faster arithmetic -> why it is not used.
        time: when, in seconds since 1970.
    """

    compute_dtype: str | None = None
    kendall: float | None = None
    reason: str | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Refuse what a damaged file may hold."""
        words = (self.compute_dtype, self.reason)
        numbers = (self.time, 0.0 if self.kendall is None else self.kendall)
        if not all(isinstance(word, str | None) for word in words):
            raise TypeError(f"compute_dtype and reason are texts, not {words}")
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"kendall and time are numbers, not {numbers}")


class WrongError(TargetError):
    """A target that computes other numbers than the bundle's probes say."""


Compute = Callable[[str | None, Sequences], Logits]
"""Runs a target in some arithmetic."""


def open_verified(
    bundle: Bundle,
    target: Target,
    options: Options,
    *,
    least_kendall: float | None = None,
    known: Proof | None = None,
) -> tuple[Backend, Proof]:
    """Open a target in the fastest arithmetic that reproduces the bundle's probes here.

    Args:
        bundle: that it is of.
        target: what to open.
        options: with an `compute_dtype`, that one alone is tried.
        least_kendall: Kendall's tau against the original that arithmetic must keep which the
            conversion was not proven in. None: what `qrank.bundle.fidelity.here` asks for.
        known: what came of it earlier in this process.

    Raises:
        MissingExtraError: its runtime is not installed.
        TargetError: no arithmetic does, or the one asked for is not to be had; or it crashed or
            hung when it was tried.
    """
    spec(target.backend).require()
    case = _Case(bundle, target, options, least_kendall)
    proof = known or case.recalled()
    backend = None
    if proof is None:
        proof, backend = _verify(case)
        case.remember(proof)
        for compute_dtype, reason in proof.rejected.items():
            log.info("%s does not compute in %s: %s", target.name, compute_dtype, reason)
        if proof.reason is not None:
            raise TargetError(proof.reason)
    elif proof.reason is not None:
        raise TargetError(
            f"{proof.reason}. So it was found less than a day ago; to try again at once: "
            "qrank cache --clear proofs"
        )
    return backend or case.open(proof.compute_dtype), proof


def _verify(case: _Case) -> tuple[Proof, Backend | None]:
    """Find out how a target runs here; with the backend where it was opened in this process."""
    target = case.target
    if isolation.advised(target.backend, target.device):
        log.info("trying %s in a process of its own, once", target.name)
        try:
            with isolation.Worker() as worker:
                return case.settle(*case.apart(worker)), None
        except NoChildError as error:
            log.warning("%s: so %s is tried in this one", error, target.name)
    return _verify_here(case)


def _verify_here(case: _Case) -> tuple[Proof, Backend]:
    choices = spec(case.target.backend).compute_dtypes(case.target.device)
    opened: list[Backend] = []

    def compute(compute_dtype: str | None, work: Sequences) -> Logits:
        while opened:
            opened.pop().close()
        opened.append(case.open(compute_dtype))
        return opened[-1].logits(work) if len(work) else np.empty(0, np.float32)

    try:
        proof = case.settle(choices, compute)
        if proof.reason is not None:
            raise TargetError(proof.reason)
    except BaseException:
        while opened:
            opened.pop().close()
        raise
    return proof, opened[-1]


@dataclass(frozen=True)
class _Case:
    """A target to be verified, how it shall run, and what is asked of it; see `open_verified`."""

    bundle: Bundle
    target: Target
    options: Options
    least_kendall: float | None

    def open(self, compute_dtype: str | None) -> Backend:
        """The target's backend in this process, computing in some arithmetic."""
        chosen = replace(self.options, compute_dtype=compute_dtype)
        target = self.target
        opened = spec(target.backend).open
        return opened(self.bundle.folder, target.variant, target.device, chosen)

    def apart(self, worker: isolation.Worker) -> tuple[Sequence[str], Compute]:
        """What `settle` takes, of a process of its own."""
        named = {"backend": self.target.backend, "device": self.target.device}

        def compute(compute_dtype: str | None, work: Sequences) -> Logits:
            chosen = replace(self.options, compute_dtype=compute_dtype)
            folder, variant = self.bundle.folder, self.target.variant
            return worker.logits(folder, variant, [work], chosen, **named)[0]

        return worker.compute_dtypes(**named), compute

    def settle(self, choices: Sequence[str], compute: Compute) -> Proof:
        """Try arithmetic, the fastest first.

        Args:
            choices: arithmetic there is, the fastest first; none: the backend's own.
            compute: runs the target in it.

        Returns:
            A proof; with a `reason` where the last arithmetic crashes, hangs or computes wrongly.

        Raises:
            QrankError: the last arithmetic fails in another way, which is not to be remembered.
        """
        named = self.options.compute_dtype
        tried: Sequence[str | None] = choices or (named,)
        if named is not None and ":" not in self.target.backend:
            if named not in choices:
                raise TargetError(
                    f"{self.target.name} cannot compute in {named} here; it can in: "
                    f"{', '.join(choices) or 'its own arithmetic alone'}"
                )
            tried = (named,)
        rejected: dict[str, str] = {}
        *faster, last = tried
        for compute_dtype in faster:
            try:
                return Proof(compute_dtype, self._hold(compute_dtype, compute), rejected=rejected)
            except NoChildError:
                raise
            except QrankError as error:
                rejected[str(compute_dtype)] = str(error)
        try:
            return Proof(last, self._hold(last, compute), rejected=rejected)
        except (FatalError, WrongError) as error:
            return Proof(last, reason=str(error), rejected=rejected)

    def _hold(self, compute_dtype: str | None, compute: Compute) -> float | None:
        """Hold the target in some arithmetic against the probes; see `Proof.kendall`.

        Raises:
            WrongError: it does not reproduce them; with the figures.
        """
        exact = compute_dtype in (None, CONVERTED_IN)
        # A conversion looked at all probes in the one; nobody did in the others.
        probes = _some(self.bundle.manifest.probes) if exact else self.bundle.manifest.probes
        logits = compute(compute_dtype, probes.work)
        if len(probes.work) == 0:
            return None  # the original itself: `qrank.backends.torch.as_bundle`
        # On the scale of all probes.
        spread = float(np.ptp(self.bundle.manifest.probes.logits))
        fidelity = replace(Fidelity.of(logits, probes.logits), spread=spread)
        variant = self.target.variant
        bar = here(tolerance(variant.format, variant.precision), exact=exact)
        if not exact:
            bar = replace(bar, kendall=max(bar.kendall, self.least_kendall or -1.0))
        if missed := bar.shortfall(fidelity):
            raise WrongError(
                f"{self.target.name} computes wrongly on this machine ({self._runtime()}): "
                f"{missed} against the probes of the bundle. Name another variant or device"
            )
        return None if exact else fidelity.kendall

    def recalled(self) -> Proof | None:
        """What came of it before; None where nobody knows."""
        key = self._key()
        proof = None if key is None else cache.load(_KIND, key, Proof)
        if proof is None or proof.reason is None:
            return proof
        return proof if 0 <= time.time() - proof.time < _FAILURE_SECONDS else None

    def remember(self, proof: Proof) -> None:
        """Keep what came of it, where there is a cache."""
        key = self._key()
        if key is not None:
            cache.store(_KIND, key, asdict(proof))

    def _key(self) -> dict[str, Any] | None:
        """What a proof holds for; None where nothing tells: of a user's own backend."""
        target, options, probes = self.target, self.options, self.bundle.manifest.probes
        if ":" in target.backend or len(probes.work) == 0:
            return None
        return target.cache_key(
            self.bundle.manifest,
            probes=_digest(probes),
            least_kendall=self.least_kendall,
            compute_dtype=options.compute_dtype,
            threads=options.threads,
            max_batch_tokens=options.max_batch_tokens,
            static_shapes=options.static_shapes,
        )

    def _runtime(self) -> str:
        return spec(self.target.backend).version()


def _digest(probes: Probes) -> str:
    total = hashlib.sha256(probes.logits.tobytes())
    for sequence in (*probes.work.ids, *(probes.work.segments or ())):
        total.update(sequence.tobytes())
    return total.hexdigest()


def _some(probes: Probes) -> Probes:
    """The shortest probes, up to a token count that costs a fraction of a second; and the longest.

    Kernels differ by length.
    """
    order = np.argsort(probes.work.lengths, kind="stable")
    few = max(int((np.cumsum(probes.work.lengths[order]) <= _PROBE_TOKENS).sum()), 4)
    kept = order if few >= len(order) else np.append(order[:few], order[-1])
    return replace(probes, work=probes.work.take(kept), logits=probes.logits[kept])
