"""Choose the target to run: by measurements on this machine, or else by a static guess."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar, get_args

from qrank.backends import Options
from qrank.bundle.agreement import LEAST
from qrank.bundle.manifest import Manifest, Variant
from qrank.errors import BundleError, InputError, MissingExtraError, TargetError
from qrank.select.losses import losses
from qrank.select.measurements import PROFILES, Measurement, Profile, recalled
from qrank.select.targets import NEEDS_RANKING, Target, TargetKey, guesses, named

Taken = TypeVar("Taken")

Policy = Literal["fastest", "smallest", "most-faithful"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

TIE_MARGIN = 0.05
"""Targets whose speeds differ by less than this share count as equally fast: the more faithful one
is taken."""

MAX_LOSS = 0.01
"""Measured nDCG@10 loss above which a variant is taken last."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Choice:
    """A target to run.

    Attributes:
        target: the variant and the device.
        options: how it runs.
        measured: whether it was chosen by measurements; else by a guess.
        among: how many targets there were to choose from; 1 if a backend is named.
        least_kendall: least Kendall's tau against the original for a compute dtype that the
            conversion was not proven in; None: the bound that holds for every target.
    """

    target: Target
    options: Options
    measured: bool
    among: int
    least_kendall: float | None = None


@dataclass(frozen=True)
class Criteria:
    """Criteria for choosing a target.

    Attributes:
        backend: see `qrank.select.targets.guesses`. If named, no other is ever taken.
        device: see `qrank.select.targets.guesses`; None: the CPU, or any that was measured.
        policy: `fastest`; `smallest`; or `most-faithful`, by Kendall's tau on the probes.
        min_kendall: least Kendall's tau against the original, on the bundle's probes.
        max_loss: largest nDCG@10 loss against fp32 that `qrank eval` may have measured; variants
            that it has not measured are not taken.
        profile: what the work is like.
    """

    backend: str | None = None
    device: str | None = None
    policy: Policy = "fastest"
    min_kendall: float | None = None
    max_loss: float | None = None
    profile: Profile = "passages"

    def __post_init__(self) -> None:
        """Reject an unknown policy or profile, and a tau outside -1 to 1."""
        if self.policy not in POLICIES:
            raise InputError(f"policy is {self.policy!r}; policies are: {', '.join(POLICIES)}")
        if self.profile not in PROFILES:
            raise InputError(f"profile is {self.profile!r}; profiles are: {', '.join(PROFILES)}")
        if self.min_kendall is not None and not -1 <= self.min_kendall <= 1:
            raise InputError(f"min_kendall is {self.min_kendall}; Kendall's tau is -1 to 1")


def choices(manifest: Manifest, criteria: Criteria, options: Options) -> list[Choice]:
    """Targets to try, the best first; only one if a backend is named.

    Args:
        manifest: the bundle's.
        criteria: what decides.
        options: what the user set: a `compute_dtype` or `max_batch_tokens` that is not None
            is kept, and `threads` is the limit.

    Raises:
        TargetError: the bundle has no target that meets the criteria.
    """
    kept = _within_loss(manifest, criteria)
    last = deprioritized(manifest, criteria)
    fitting = [m for m in _measured(manifest, criteria, options) if m.target.variant in kept]
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
    """Least Kendall's tau for a compute dtype that the conversion was not proven in."""
    if criteria.policy == "most-faithful" and not choice.measured:
        return choice.target.variant.fidelity.kendall
    return criteria.min_kendall


def deprioritized(manifest: Manifest, criteria: Criteria) -> set[str]:
    """Names of variants to take last.

    They lose over MAX_LOSS. If `qrank eval` has not measured them, they agree with the original by
    less than LEAST on the conversion's rankings, or are of NEEDS_RANKING and have not ranked.

    Empty if a backend or a bound on the loss is given: then that decides.
    """
    if criteria.backend is not None or criteria.max_loss is not None:
        return set()
    known = losses(manifest, criteria.device or "cpu")
    return {
        name
        for name, variant in manifest.variants.items()
        if (known[name].mean > MAX_LOSS if name in known else _doubtful(variant))
    }


def _doubtful(variant: Variant) -> bool:
    """Whether a variant that `qrank eval` has not measured may lose more than MAX_LOSS."""
    if variant.ranking is None:
        return variant.precision in NEEDS_RANKING
    return variant.ranking.ndcg < LEAST


def _within_loss(manifest: Manifest, criteria: Criteria) -> set[str]:
    """Names of variants within the bound on the loss; all if there is no bound.

    Raises:
        TargetError: no eligible variant is known to be within it; the message lists known losses.
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


def first_that_works(ordered: list[Choice], take: Callable[[Choice], Taken]) -> Taken:
    """Try `take` on each choice in order until one works; warn about each that fails.

    Returns:
        What `take` returned for the one that works.

    Raises:
        BundleError, TargetError, MissingExtraError: none works; if there were several, a
            TargetError with each one's reason.
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


class Rated(Protocol):
    """A target with the properties that `order` uses: see `Measurement`."""

    @property
    def target(self) -> TargetKey:
        """The target."""

    @property
    def reason(self) -> str | None:
        """Why it cannot be used; None if it can."""

    @property
    def kendall(self) -> float:
        """Kendall's tau against the original."""

    @property
    def bytes(self) -> int:
        """Size of its files."""

    def speed(self, profile: Profile) -> float:
        """Pairs per second."""


RatedTarget = TypeVar("RatedTarget", bound=Rated)


def order(
    rated: Iterable[RatedTarget], criteria: Criteria, last: Collection[str] = ()
) -> list[RatedTarget]:
    """Usable targets, the best first; see `Criteria` and TIE_MARGIN.

    Args:
        rated: in any order.
        criteria: what decides.
        last: names of variants to take after all others, from `deprioritized`.
    """
    ordered = _by_policy(rated, criteria)
    return sorted(ordered, key=lambda m: m.target.variant in last)


def _by_policy(rated: Iterable[RatedTarget], criteria: Criteria) -> list[RatedTarget]:
    rest = [m for m in rated if m.reason is None and _faithful(m.kendall, criteria)]
    rest.sort(key=lambda m: -m.speed(criteria.profile))
    if criteria.policy == "smallest":
        return sorted(rest, key=lambda m: m.bytes)
    if criteria.policy == "most-faithful":
        return sorted(rest, key=lambda m: -m.kendall)
    ordered: list[RatedTarget] = []
    while rest:
        fastest = rest[0].speed(criteria.profile)
        alike = [m for m in rest if m.speed(criteria.profile) >= fastest * (1 - TIE_MARGIN)]
        ordered.append(max(alike, key=lambda m: m.kendall))
        rest.remove(ordered[-1])
    return ordered


def _faithful(kendall: float, criteria: Criteria) -> bool:
    return criteria.min_kendall is None or kendall >= criteria.min_kendall


def _measured(manifest: Manifest, criteria: Criteria, options: Options) -> list[Measurement]:
    """Measurements of the usable targets that match the backend, device and compute dtype."""
    wanted = None if criteria.backend is None else named(manifest, criteria.backend)

    def asked_for(found: Measurement) -> bool:
        target = Target.of(found.target, manifest)
        return (
            (wanted is None or (target.variant, target.backend) in wanted)
            and criteria.device in (None, target.device)
            and options.compute_dtype in (None, found.compute_dtype)
        )

    known = recalled(manifest, options.threads)
    return [m for m in known if m.reason is None and asked_for(m)]


def _choice(manifest: Manifest, found: Measurement, options: Options, among: int) -> Choice:
    options = replace(
        options,
        compute_dtype=options.compute_dtype or found.compute_dtype,
        max_batch_tokens=options.max_batch_tokens or found.max_batch_tokens,
        threads=found.threads,
    )
    return Choice(Target.of(found.target, manifest), options, True, among)
