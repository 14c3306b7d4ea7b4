"""A target on this machine: opened, in the fastest arithmetic that computes rightly here."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from qrank import machine, paths
from qrank.backends import Backend, Options, executions, module, opener
from qrank.bundle import Manifest, Probes
from qrank.errors import TargetError
from qrank.fidelity import TOLERANCES, Fidelity
from qrank.targets import Target

_PROBE_TOKENS = 1024

_MARGIN = 0.5
"""The share of the tolerance that arithmetic may use that a conversion was not proven in: few
probes are looked at here, and they are short."""

_PROVEN = "proven"

log = logging.getLogger("qrank")


def ready(folder: Path, target: Target, manifest: Manifest, options: Options) -> Backend:
    """Open a target in the fastest arithmetic that reproduces the bundle's probes here.

    Args:
        folder: the bundle.
        target: what to open.
        manifest: the bundle's.
        options: with an `execution`, that one alone is tried.

    Raises:
        TargetError: no arithmetic does, or the one asked for is not to be had.
    """
    own = ":" in target.backend
    choices = () if own else executions(target.backend, target.device)
    converted_in = choices[-1] if choices else options.execution
    if options.execution is not None and not own:
        if options.execution not in choices:
            raise TargetError(
                f"{target.name} cannot compute in {options.execution} here; it can in: "
                f"{', '.join(choices) or 'its own arithmetic alone'}"
            )
        choices = (options.execution,)

    def proven(execution: str | None) -> Backend:
        chosen = replace(options, execution=execution)
        backend = opener(target.backend)(folder, target.variant, target.device, chosen)
        try:
            share = 1.0 if execution == converted_in else _MARGIN
            prove(backend, target, manifest, execution, share)
        except BaseException:
            backend.close()
            raise
        return backend

    *faster, exact = choices or (options.execution,)
    for execution in faster:
        if _recalled(_key(target, manifest, execution)) is False:
            log.info("%s does not compute in %s: it did not before", target.name, execution)
            continue
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
    share: float = 1.0,
) -> None:
    """Make sure a target reproduces the bundle's probes on this very machine.

    Done once: what came of it is remembered by bundle, target, arithmetic, runtime version and CPU,
    a failure so that faster arithmetic is not tried at every start. A user's own backend is proven
    each time: nothing tells when its code changes.

    Args:
        backend: opened.
        target: what it was opened for.
        manifest: the bundle's.
        execution: arithmetic it was opened in.
        share: of the tolerance that may be used.

    Raises:
        TargetError: it does not; with the figures.
    """
    if len(manifest.probes.work) == 0:
        return  # the original itself: `qrank.backends.torch.as_bundle`
    key = _key(target, manifest, execution)
    if _recalled(key):
        return
    probes = _some(manifest.probes)
    fidelity = Fidelity.of(backend.logits(probes.work), probes.logits)
    # A rank correlation of so few pairs says little: hold the differences alone, on the scale of
    # all probes.
    tolerance = TOLERANCES[target.variant.precision]
    tolerance = replace(tolerance, share=tolerance.share * share, kendall=-1.0)
    fidelity = replace(fidelity, spread=float(np.ptp(manifest.probes.logits)))
    missed = tolerance.shortfall(fidelity)
    if key is not None:
        paths.remember(_PROVEN, {**paths.recall(_PROVEN), key: not missed})
    if missed:
        raise TargetError(
            f"{target.name} computes wrongly on this machine ({_runtime(target)}): {missed} "
            "against the probes of the bundle. Name another variant or device"
        )


def _key(target: Target, manifest: Manifest, execution: str | None) -> str | None:
    """What a proof holds for; None where nothing tells."""
    if ":" in target.backend:
        return None
    runtime = _runtime(target)
    return f"{manifest.digest} {target.name} {execution} {runtime} {machine.cpu()}"


def _recalled(key: str | None) -> bool | None:
    """Whether a proof held; None where nobody knows."""
    held: bool | None = None if key is None else paths.recall(_PROVEN).get(key)
    return held


def _runtime(target: Target) -> str:
    own = ":" in target.backend
    return target.backend if own else str(module(target.backend).version())


def _some(probes: Probes) -> Probes:
    """The shortest probes, up to a token count that costs a fraction of a second."""
    order = np.argsort(probes.work.lengths, kind="stable")
    kept = order[: max(int((np.cumsum(probes.work.lengths[order]) <= _PROBE_TOKENS).sum()), 4)]
    return replace(probes, work=probes.work.take(kept), logits=probes.logits[kept])
