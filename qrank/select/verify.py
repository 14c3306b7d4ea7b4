"""Open a target in the fastest compute dtype that gives right logits on this machine.

A target that has never run here is first checked against the bundle's probes, in a separate process
if a native library could crash this one (`qrank.backends.isolation`). The result is cached.
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
"""Compute dtype that conversions are proven in, if the backend has a choice."""

_PROBE_TOKENS = 512
"""Tokens of the shortest probes to run, besides the longest one: they keep a first start short."""

_FAILURE_SECONDS = 24 * 3600
"""How long a failure is cached: the machine may have been busy, or may be repaired by then."""

_KIND = "proofs"

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Proof:
    """Result of checking a target against its bundle's probes on this machine.

    Attributes:
        compute_dtype: data type it computes in; None if the backend has no choice.
        kendall: Kendall's tau against the original, in a compute dtype that the conversion was not
            proven in; None otherwise, since the manifest has it.
        reason: why the target cannot be used; None if it can.
        rejected: faster compute dtype -> why it is not used.
        time: time of the check, in seconds since 1970.
    """

    compute_dtype: str | None = None
    kendall: float | None = None
    reason: str | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Reject field types that a damaged file may hold."""
        words = (self.compute_dtype, self.reason)
        numbers = (self.time, 0.0 if self.kendall is None else self.kendall)
        if not all(isinstance(word, str | None) for word in words):
            raise TypeError(f"compute_dtype and reason are texts, not {words}")
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"kendall and time are numbers, not {numbers}")


class WrongError(TargetError):
    """A target whose logits do not match the bundle's probes."""


Compute = Callable[[str | None, Sequences], Logits]
"""Runs a target in a compute dtype."""


def open_verified(
    bundle: Bundle,
    target: Target,
    options: Options,
    *,
    least_kendall: float | None = None,
    known: Proof | None = None,
) -> tuple[Backend, Proof]:
    """Open a target in the fastest compute dtype that reproduces the bundle's probes here.

    Args:
        bundle: the target's bundle.
        target: what to open.
        options: if `compute_dtype` is set, only that one is tried.
        least_kendall: least Kendall's tau against the original in a compute dtype that the
            conversion was not proven in. None: what `qrank.bundle.fidelity.here` requires.
        known: the proof from an earlier call in this process.

    Raises:
        MissingExtraError: its runtime is not installed.
        TargetError: no compute dtype reproduces the probes, or the one asked for is not available;
            or the target crashed or hung when it was tried.
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
    """Check a target; also return the backend, if it was opened in this process."""
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
    """A target to verify, its options and its required tau; see `open_verified`."""

    bundle: Bundle
    target: Target
    options: Options
    least_kendall: float | None

    def open(self, compute_dtype: str | None) -> Backend:
        """Open the target's backend in this process, in a compute dtype."""
        chosen = replace(self.options, compute_dtype=compute_dtype)
        target = self.target
        opened = spec(target.backend).open
        return opened(self.bundle.folder, target.variant, target.device, chosen)

    def apart(self, worker: isolation.Worker) -> tuple[Sequence[str], Compute]:
        """Arguments for `settle` that run the target in a separate process."""
        named = {"backend": self.target.backend, "device": self.target.device}

        def compute(compute_dtype: str | None, work: Sequences) -> Logits:
            chosen = replace(self.options, compute_dtype=compute_dtype)
            folder, variant = self.bundle.folder, self.target.variant
            return worker.logits(folder, variant, [work], chosen, **named)[0]

        return worker.compute_dtypes(**named), compute

    def settle(self, choices: Sequence[str], compute: Compute) -> Proof:
        """Try the compute dtypes, the fastest first.

        Args:
            choices: available compute dtypes, the fastest first; empty: the backend has no choice.
            compute: runs the target in one of them.

        Returns:
            The proof; `reason` is set if the last compute dtype crashes, hangs or gives wrong
            logits.

        Raises:
            QrankError: the last compute dtype fails in another way, which must not be cached.
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
        """Check the target in a compute dtype against the probes; return `Proof.kendall`.

        Raises:
            WrongError: it does not reproduce them; the message has the figures.
        """
        exact = compute_dtype in (None, CONVERTED_IN)
        # The conversion checked all probes in CONVERTED_IN, but not in other dtypes.
        probes = _some(self.bundle.manifest.probes) if exact else self.bundle.manifest.probes
        logits = compute(compute_dtype, probes.work)
        if len(probes.work) == 0:
            return None  # the original itself: `qrank.backends.torch.as_bundle`
        # The spread is over all probes, even if only some were run.
        spread = float(np.ptp(self.bundle.manifest.probes.logits))
        fidelity = replace(Fidelity.of(logits, probes.logits), spread=spread)
        variant = self.target.variant
        bar = here(tolerance(variant.format, variant.precision), exact=exact)
        if not exact:
            bar = replace(bar, kendall=max(bar.kendall, self.least_kendall or -1.0))
        if missed := bar.shortfall(fidelity):
            raise WrongError(
                f"{self.target.name} computes wrongly on this machine ({self._runtime()}): "
                f"{missed} against the probes of the bundle{_lost(logits, compute_dtype)}. Name "
                "another variant or device"
            )
        return None if exact else fidelity.kendall

    def recalled(self) -> Proof | None:
        """The cached proof; None if there is none, or only a failure that has expired."""
        key = self._key()
        proof = None if key is None else cache.load(_KIND, key, Proof)
        if proof is None or proof.reason is None:
            return proof
        return proof if 0 <= time.time() - proof.time < _FAILURE_SECONDS else None

    def remember(self, proof: Proof) -> None:
        """Store the proof, if there is a cache."""
        key = self._key()
        if key is not None:
            cache.store(_KIND, key, asdict(proof))

    def _key(self) -> dict[str, Any] | None:
        """Cache key of the proof; None for a user's own backend or a bundle without probes."""
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


def _lost(logits: Logits, compute_dtype: str | None) -> str:
    """How many logits are no numbers, and why that may be; "" if all are."""
    count = int(np.count_nonzero(~np.isfinite(logits)))
    if not count:
        return ""
    why = ": fp16 ends at 65,504, and the model may compute larger numbers"
    lost = f"{count} of {len(logits)} logits are infinite or no numbers"
    return f" ({lost}{why if compute_dtype == 'fp16' else ''})"


def _digest(probes: Probes) -> str:
    total = hashlib.sha256(probes.logits.tobytes())
    for sequence in (*probes.work.ids, *(probes.work.segments or ())):
        total.update(sequence.tobytes())
    return total.hexdigest()


def _some(probes: Probes) -> Probes:
    """The shortest probes, up to _PROBE_TOKENS but at least 4, and the longest one.

    They take a fraction of a second. Kernels differ by length, so both ends are run.
    """
    order = np.argsort(probes.work.lengths, kind="stable")
    few = max(int((np.cumsum(probes.work.lengths[order]) <= _PROBE_TOKENS).sum()), 4)
    kept = order if few >= len(order) else np.append(order[:few], order[-1])
    return replace(probes, work=probes.work.take(kept), logits=probes.logits[kept])
