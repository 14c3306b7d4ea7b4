"""Which target runs: by what was measured on this machine, or else by a static guess."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from qrank.backends import BACKENDS, Options, runtime
from qrank.bundle.manifest import Manifest
from qrank.errors import BundleError, InputError, MissingExtraError, TargetError
from qrank.select.losses import losses
from qrank.select.targets import Target, guesses
from qrank.system import cache, machine
from qrank.system.version import __version__

Policy = Literal["fastest", "smallest", "most-faithful"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

Profile = Literal["short", "passages", "long"]

PROFILES: dict[Profile, tuple[int, int]] = {
    "short": (1, 32),
    "passages": (20, 128),
    "long": (100, 512),
}
"""What targets are timed on -> documents, and tokens of each with its query."""

TIE_MARGIN = 0.05
"""Targets that differ by less than this share of their speed are equally fast: the more faithful
of them is taken."""

NEEDS_EVAL = ("int8-w8a8",)
"""Precisions whose loss probes cannot tell: activations are scaled by what calibration saw, and one
passed its probes that lost 0.048 nDCG@10 (docs/benchmarks.md)."""

MAX_LOSS = 0.01
"""nDCG@10 that a variant may have been found to lose, and be taken like any other."""

_KIND = "measurements"

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Measurement:
    """What a target was found to do on this machine, or why it cannot be used.

    Attributes:
        target: its name.
        selector: what names it as a backend.
        device: lower case.
        reason: why it cannot be used; None if it can.
        compute_dtype: arithmetic it computes in; None where there is no choice.
        threads: CPU threads it was fastest with.
        batch: padded tokens a batch it was fastest with; None: its own choice.
        speeds: pairs a second, by profile.
        load: seconds to open it.
        kendall: Kendall's tau against the original, on the bundle's probes.
        bytes: size of its files.
    """

    target: str
    selector: str
    device: str
    reason: str | None = None
    compute_dtype: str | None = None
    threads: int = 1
    batch: int | None = None
    speeds: dict[str, float] = field(default_factory=dict)
    load: float = 0.0
    kendall: float = -1.0
    bytes: int = 0

    def check(self, manifest: Manifest) -> None:
        """See that it is one of a bundle's, and whole, as a damaged file's is not.

        Raises:
            ValueError, TypeError: it is not.
        """
        if self.reason is not None:
            return
        if self.variant not in manifest.variants:
            raise ValueError(f"the bundle has no {self.variant}")
        speeds = [self.speeds[profile] for profile in PROFILES if profile in self.speeds]
        if len(speeds) < len(PROFILES) or not all(0 < speed < math.inf for speed in speeds):
            raise ValueError(f"{self.target} has no speed for each profile: {self.speeds}")
        if not (-1 <= self.kendall <= 1 and self.threads >= 1 and self.bytes >= 0):
            raise ValueError(f"{self.target} has a number out of its range")

    @property
    def variant(self) -> str:
        """Its name, in the bundle: `onnx-int8`."""
        return self.target.partition("@")[0].rpartition("/")[2]

    @property
    def setting(self) -> str:
        """What distinguishes it from the target's other measurements, for people; "" mostly."""
        batch = f"{self.batch} a batch" if self.batch else ""
        return ", ".join(part for part in (self.compute_dtype, batch) if part)


@dataclass(frozen=True)
class Choice:
    """A target to run.

    Attributes:
        target: the variant and the device.
        options: how it shall run.
        measured: whether it was chosen by measurements; else by a guess.
        among: how many targets there were to choose from; 1 where a backend is named.
        least_kendall: Kendall's tau against the original that its arithmetic must keep; None: what
            any must.
    """

    target: Target
    options: Options
    measured: bool
    among: int
    least_kendall: float | None = None


@dataclass(frozen=True)
class Criteria:
    """What a target is chosen by.

    Attributes:
        backend: see `qrank.select.targets.guesses`. Named, nothing else is ever taken.
        device: likewise; None: the CPU, or any that was measured.
        policy: `fastest`; `smallest`; or `most-faithful`, by Kendall's tau on the probes.
        min_kendall: least Kendall's tau against the original, on the bundle's probes.
        max_loss: most nDCG@10 that `qrank eval` may have found a variant to lose against fp32; what
            it has not measured is not taken.
        profile: what the work is like.
    """

    backend: str | None = None
    device: str | None = None
    policy: Policy = "fastest"
    min_kendall: float | None = None
    max_loss: float | None = None
    profile: Profile = "passages"

    def __post_init__(self) -> None:
        """Refuse what is no policy, profile or correlation."""
        if self.policy not in POLICIES:
            raise InputError(f"policy is {self.policy!r}; policies are: {', '.join(POLICIES)}")
        if self.profile not in PROFILES:
            raise InputError(f"profile is {self.profile!r}; profiles are: {', '.join(PROFILES)}")
        if self.min_kendall is not None and not -1 <= self.min_kendall <= 1:
            raise InputError(f"min_kendall is {self.min_kendall}; Kendall's tau is -1 to 1")


def choices(manifest: Manifest, criteria: Criteria, options: Options) -> list[Choice]:
    """Targets to try, the best first; one where a backend is named.

    Args:
        manifest: of the bundle.
        criteria: what decides.
        options: what the user set: an `compute_dtype` or `batch` that is not None stands, and
            `threads` is the limit.

    Raises:
        TargetError: the bundle has no such target, or none so faithful.
    """
    kept = _within_loss(manifest, criteria)
    known = [m for m in recalled(manifest, options.threads) if m.variant in kept]
    fitting = [
        m for m in known if _named(m, criteria) and options.compute_dtype in (None, m.compute_dtype)
    ]
    last = deprioritized(manifest, criteria)
    ordered = [_choice(manifest, m, options, len(fitting)) for m in order(fitting, criteria, last)]
    if not ordered:
        faithful = _guessed(manifest, criteria)
        targets = [t for t in faithful if t.variant.name in kept]
        if not targets:
            raise TargetError(
                f"no variant of {manifest.name} both loses {criteria.max_loss} nDCG@10 or less "
                f"({', '.join(sorted(kept))}) and is as faithful as asked for "
                f"({', '.join(t.variant.name for t in faithful)}): relax one of the two"
            )
        targets.sort(key=lambda target: target.variant.name in last)
        ordered = [Choice(target, options, False, len(targets)) for target in targets]
    ordered = [
        replace(choice, least_kendall=_least_kendall(choice, criteria)) for choice in ordered
    ]
    return ordered if criteria.backend is None else [replace(ordered[0], among=1)]


def _least_kendall(choice: Choice, criteria: Criteria) -> float | None:
    """What is asked of arithmetic that the conversion was not proven in."""
    if criteria.policy == "most-faithful" and not choice.measured:
        return choice.target.variant.fidelity.kendall
    return criteria.min_kendall


def deprioritized(manifest: Manifest, criteria: Criteria) -> set[str]:
    """Names of variants to take last: found to lose more than LOSS, or UNTOLD and not measured.

    None where a backend is named, or a bound on the loss: then that decides.
    """
    if criteria.backend is not None or criteria.max_loss is not None:
        return set()
    known = losses(manifest, criteria.device or "cpu")
    return {
        name
        for name, variant in manifest.variants.items()
        if (known[name].mean > MAX_LOSS if name in known else variant.precision in NEEDS_EVAL)
    }


def _within_loss(manifest: Manifest, criteria: Criteria) -> set[str]:
    """Names of variants that lose no more than may be lost: all, where nothing is said of that.

    Raises:
        TargetError: none of those that may be taken is known to; with what is known.
    """
    if criteria.max_loss is None:
        return set(manifest.variants)
    wanted = {
        target.variant.name for target in guesses(manifest, criteria.backend, criteria.device)
    }
    found = losses(manifest, criteria.device or "cpu")
    known = {name: loss for name, loss in found.items() if name in wanted}
    kept = {name for name, loss in known.items() if loss.mean <= criteria.max_loss}
    if not kept:
        measured = ", ".join(
            f"{name} {loss.mean:.4f} (±{loss.margin:.4f}, {loss.queries} queries of {loss.data})"
            for name, loss in known.items()
        )
        raise TargetError(
            f"no variant of {manifest.name} is known to lose {criteria.max_loss} nDCG@10 or less; "
            f"measured here: {measured or 'none'}. Measure them: qrank eval BUNDLE --data FOLDER"
        )
    return kept


def _guessed(manifest: Manifest, criteria: Criteria) -> list[Target]:
    targets = guesses(manifest, criteria.backend, criteria.device)
    faithful = [t for t in targets if _faithful(t.variant.fidelity.kendall, criteria)]
    if not faithful:
        taus = {t.variant.name: t.variant.fidelity.kendall for t in targets}
        raise TargetError(
            f"no target has a Kendall tau of {criteria.min_kendall} or more; there are: "
            + ", ".join(f"{name} {tau:.4f}" for name, tau in taus.items())
        )
    if criteria.policy == "smallest":
        faithful.sort(key=lambda t: t.variant.bytes)
    if criteria.policy == "most-faithful":
        faithful.sort(key=lambda t: -t.variant.fidelity.kendall)
    return faithful


def first_that_works(ordered: list[Choice], take: Callable[[Choice], None]) -> None:
    """Take choices in their order until one can be taken; warn of each that cannot.

    Raises:
        BundleError, TargetError, MissingExtraError: none can; of several, every one's reason.
    """
    reasons: list[str] = []
    for choice in ordered:
        try:
            return take(choice)
        except (BundleError, TargetError, MissingExtraError) as error:
            if len(ordered) == 1:
                raise
            reasons.append(f"{choice.target.name}: {error}")
            if choice is not ordered[-1]:
                log.warning("taking the next target: %s", reasons[-1])
    raise TargetError("no target works here:\n  " + "\n  ".join(reasons))


def order(
    measured: Iterable[Measurement], criteria: Criteria, last: Collection[str] = ()
) -> list[Measurement]:
    """Usable targets, the one to take first; see `Criteria` and ALIKE.

    Args:
        measured: in any order.
        criteria: what decides.
        last: names of variants to take after all others, of `deprioritized`.
    """
    ordered = _by_policy(measured, criteria)
    return sorted(ordered, key=lambda m: m.variant in last)


def _by_policy(measured: Iterable[Measurement], criteria: Criteria) -> list[Measurement]:
    rest = [m for m in measured if m.reason is None and _faithful(m.kendall, criteria)]
    rest.sort(key=lambda m: -m.speeds[criteria.profile])
    if criteria.policy == "smallest":
        return sorted(rest, key=lambda m: m.bytes)
    if criteria.policy == "most-faithful":
        return sorted(rest, key=lambda m: -m.kendall)
    ordered: list[Measurement] = []
    while rest:
        fastest = rest[0].speeds[criteria.profile]
        alike = [m for m in rest if m.speeds[criteria.profile] >= fastest * (1 - TIE_MARGIN)]
        ordered.append(max(alike, key=lambda m: m.kendall))
        rest.remove(ordered[-1])
    return ordered


def recalled(manifest: Manifest, threads: int) -> list[Measurement]:
    """What was measured for a bundle on this machine as it is now; [] if nothing was."""

    def read(targets: list[dict[str, Any]]) -> list[Measurement]:
        found = [Measurement(**fields) for fields in targets]
        for measurement in found:
            measurement.check(manifest)
        return found

    return cache.load(_KIND, _key(manifest, threads), read) or []


def remember(manifest: Manifest, threads: int, measured: Iterable[Measurement]) -> None:
    """Keep measurements, where there is a cache."""
    content = {"targets": [asdict(m) for m in measured]}
    cache.store(_KIND, _key(manifest, threads), content)


def _key(manifest: Manifest, threads: int) -> dict[str, Any]:
    """What a measurement holds for: another bundle, machine, driver or version wants another."""
    return {
        "bundle": manifest.digest,
        "qrank": __version__,
        "cpu": machine.cpu(),
        "system": machine.system(),
        "accelerators": machine.accelerators(),
        "runtimes": {name: runtime(name) for name in BACKENDS},
        "threads": threads,
    }


def _faithful(kendall: float, criteria: Criteria) -> bool:
    return criteria.min_kendall is None or kendall >= criteria.min_kendall


def _named(found: Measurement, criteria: Criteria) -> bool:
    runner = found.selector.rpartition("/")[0]
    names = (found.selector, runner or found.variant.partition("-")[0])
    return criteria.backend in (None, *names) and criteria.device in (None, found.device)


def _choice(manifest: Manifest, found: Measurement, options: Options, among: int) -> Choice:
    runner = found.selector.rpartition("/")[0]
    variant = manifest.variants[found.variant]
    target = Target(variant, found.device, runner or variant.format)
    options = replace(
        options,
        compute_dtype=options.compute_dtype or found.compute_dtype,
        batch=options.batch or found.batch,
        threads=found.threads,
    )
    return Choice(target, options, True, among)
