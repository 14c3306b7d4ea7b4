"""Which variant of a bundle runs, on which device, and that it computes rightly there."""

from __future__ import annotations

import hashlib
import logging
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qrank import paths
from qrank.backends import BACKENDS, Backend, Opener, Options, executions, module
from qrank.bundle import Manifest, Probes, Variant
from qrank.errors import TargetError
from qrank.fidelity import TOLERANCES, Fidelity

PREFERRED = {"cpu": ("int8", "int8-full", "fp32", "fp16", "q8_0", "q4_k_m", "f16", "bf16")}
PREFERRED_ELSEWHERE = ("fp16", "fp32", "int8", "int8-full", "q8_0", "f16", "q4_k_m", "bf16")
_PROBE_TOKENS = 1024

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Target:
    """A variant on a device."""

    variant: Variant
    device: str

    @property
    def name(self) -> str:
        """`onnx-int8@cpu`."""
        return f"{self.variant.name}@{self.device}"


def choose(manifest: Manifest, backend: str | None, device: str | None) -> Target:
    """Pick the variant to run.

    Args:
        manifest: of the bundle.
        backend: a format (`onnx`), a variant (`onnx-fp32`), or None for any; the name of a
            user's own backend ("module:function") takes any variant too.
        device: lower-case device name; None for the CPU.

    Raises:
        TargetError: the bundle has no such variant.
    """
    device = device or "cpu"
    wanted = [
        variant
        for variant in manifest.variants.values()
        if backend is None or ":" in backend or backend in (variant.format, variant.name)
    ]
    if not wanted:
        raise TargetError(
            f"the bundle {manifest.name} has no variant for backend {backend!r}; it has: "
            f"{', '.join(manifest.variants)}; backends are: {', '.join(BACKENDS)}"
        )
    order = PREFERRED.get(device, PREFERRED_ELSEWHERE)
    # What ready-made files alone come in is last.
    return Target(min(wanted, key=lambda v: (*order, v.precision).index(v.precision)), device)


def ready(
    opener: Opener,
    folder: Path,
    target: Target,
    manifest: Manifest,
    options: Options,
    custom: str | None = None,
) -> Backend:
    """Open a target in the fastest arithmetic that reproduces the bundle's probes here.

    Args:
        opener: opens the target's backend.
        folder: the bundle.
        target: what to open.
        manifest: the bundle's.
        options: with an `execution`, that one alone is tried.
        custom: "module:function" of a user's own backend.

    Raises:
        TargetError: no arithmetic does, or the one asked for is not to be had.
    """
    choices = () if custom else executions(target.variant.format, target.device)
    if options.execution is not None and not custom:
        if options.execution not in choices:
            raise TargetError(
                f"{target.name} cannot compute in {options.execution} here; it can in: "
                f"{', '.join(choices) or 'its own arithmetic alone'}"
            )
        choices = (options.execution,)

    def proven(execution: str | None) -> Backend:
        chosen = replace(options, execution=execution)
        backend = opener(folder, target.variant, target.device, chosen)
        try:
            prove(backend, target, manifest, execution, custom)
        except BaseException:
            backend.close()
            raise
        return backend

    *faster, exact = choices or (options.execution,)
    for execution in faster:
        try:
            return proven(execution)
        except TargetError as error:
            log.info("%s does not compute in %s: %s", target.name, execution, error)
    return proven(exact)


def prove(
    backend: Backend,
    target: Target,
    manifest: Manifest,
    execution: str | None = None,
    custom: str | None = None,
) -> None:
    """Make sure a target reproduces the bundle's probes on this very machine.

    Done once: a success is remembered by bundle, target, arithmetic, runtime version and CPU. A
    user's own backend is proven each time: nothing tells when its code changes.

    Args:
        backend: opened.
        target: what it was opened for.
        manifest: the bundle's.
        execution: arithmetic it was opened in.
        custom: "module:function" of a user's own backend.

    Raises:
        TargetError: it does not; with the figures.
    """
    if len(manifest.probes.work) == 0:
        return  # the original itself: `qrank.backends.torch.as_bundle`
    runtime = custom or module(target.variant.format).version()
    key = f"{manifest.digest} {target.name} {execution} {runtime} {_cpu()}"
    if custom is None and key in paths.recall("proven"):
        return
    probes = _some(manifest.probes)
    fidelity = Fidelity.of(backend.logits(probes.work), probes.logits)
    # A rank correlation of so few pairs says little: hold the differences alone, on the scale of
    # all probes.
    tolerance = replace(TOLERANCES[target.variant.precision], kendall=-1.0)
    fidelity = replace(fidelity, spread=float(np.ptp(manifest.probes.logits)))
    if missed := tolerance.shortfall(fidelity):
        raise TargetError(
            f"{target.name} computes wrongly on this machine ({runtime}): {missed} against the "
            "probes of the bundle. Name another variant or device"
        )
    if custom is None:
        paths.remember("proven", {**paths.recall("proven"), key: True})


def _some(probes: Probes) -> Probes:
    """The shortest probes, up to a token count that costs a fraction of a second."""
    order = np.argsort(probes.work.lengths, kind="stable")
    kept = order[: max(int((np.cumsum(probes.work.lengths[order]) <= _PROBE_TOKENS).sum()), 4)]
    return replace(probes, work=probes.work.take(kept), logits=probes.logits[kept])


def _cpu() -> str:
    """A short name of this CPU: kernels differ with its instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        # The clock in this file changes; model and instruction set do not.
        text = "".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    except OSError:
        text = platform.processor()
    return platform.machine() + "-" + hashlib.sha256(text.encode()).hexdigest()[:12]
