"""Targets of a bundle, before any is opened, and a static guess of their order."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from qrank.backends import BACKENDS, format_of, formats, keys, kind, others, reads, spec
from qrank.bundle.manifest import Manifest, Variant
from qrank.errors import TargetError

NEEDS_RANKING = ("int8-w8a8",)
"""Precisions whose loss the probes do not show: with activations in one calibrated range for all
tokens, as bundles had them before conversions ranked, one lost 0.048 nDCG@10
(docs/benchmarks.md)."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class TargetKey:
    """Identifies a target within its bundle: only JSON values, without the variant's files.

    Attributes:
        variant: its name; "" if a backend as a whole is meant.
        device: lower case; "" if a backend as a whole is meant.
        backend: what runs it; None: the format's own backend.
    """

    variant: str
    device: str
    backend: str | None = None

    def __post_init__(self) -> None:
        """Reject field types that a damaged file may hold."""
        words = (self.variant, self.device, self.backend or "")
        if not all(isinstance(word, str) for word in words):
            raise TypeError(f"variant, device and backend are texts, not {words}")

    @property
    def name(self) -> str:
        """`onnx-int8@cpu`; with another package's backend, `its-name/onnx-int8@cpu`."""
        backend = None if self.backend is None or ":" in self.backend else self.backend
        place = f"@{self.device}" if self.device else ""
        return "/".join(filter(None, (backend, self.variant))) + place

    @property
    def selector(self) -> str:
        """The `backend` argument that selects this variant and backend."""
        return "/".join(filter(None, (self.backend, self.variant)))


@dataclass(frozen=True)
class Target:
    """A variant on a device, run by a backend.

    Attributes:
        variant: what runs.
        device: lower case.
        backend: the format's own, another package's, or a user's own as "module:function".
    """

    variant: Variant
    device: str
    backend: str

    @classmethod
    def of(cls, key: TargetKey, manifest: Manifest) -> Target:
        """The target of a key, in a bundle that has its variant."""
        variant = manifest.variants[key.variant]
        return cls(variant, key.device, key.backend or variant.format)

    @property
    def key(self) -> TargetKey:
        """The key that identifies it within its bundle."""
        own = self.backend == self.variant.format
        return TargetKey(self.variant.name, self.device, None if own else self.backend)

    def cache_key(self, manifest: Manifest, **how: Any) -> dict[str, Any]:
        """The cache key of its results on this machine; see `qrank.backends.keys`."""
        return keys.of_run(manifest, self.variant, self.backend, self.device, **how)

    @property
    def name(self) -> str:
        """See `TargetKey.name`."""
        return self.key.name


def guesses(manifest: Manifest, backend: str | None, device: str | None) -> list[Target]:
    """Targets by expected speed, fastest first, without looking at the machine.

    Args:
        manifest: the bundle's.
        backend: see `named`; None: every format whose runtime is installed, or every format if
            no runtime is.
        device: lower case; None: the CPU.

    Raises:
        TargetError: the bundle has no such variant, or none whose backend knows such a device.
    """
    device = device or "cpu"
    if backend is not None:
        runs = named(manifest, backend)
    else:
        readable = _readable(manifest)
        variants = [v for v in readable if kind(device) in spec(v.format).kinds]
        if not variants:
            names = dict.fromkeys(variant.format for variant in readable)
            known = {name: ", ".join(spec(name).kinds) for name in names}
            raise TargetError(
                f"no device {device!r} for the bundle {manifest.name}; its formats may have: "
                + "; ".join(f"{name} {kinds}" for name, kinds in known.items())
            )
        variants = [v for v in variants if spec(v.format).missing() is None] or variants
        runs = [(variant, variant.format) for variant in variants]
    targets = [Target(variant, device, runner) for variant, runner in runs]
    return sorted(targets, key=expected)


def _readable(manifest: Manifest) -> list[Variant]:
    """The variants of formats that this qrank knows; a warning lists the others."""
    every = manifest.variants.values()
    formats_here = {f for f in {v.format for v in every} if format_of(f) is not None}
    known = [v for v in every if v.format in formats_here]
    if unknown := [v.name for v in every if v.format not in formats_here]:
        log.warning(
            "leaving out %s of the bundle %s: this qrank knows the formats %s",
            ", ".join(unknown),
            manifest.name,
            ", ".join(formats()),
        )
    if not known:
        raise TargetError(
            f"the bundle {manifest.name} has {', '.join(manifest.variants) or 'no variant'}; this "
            f"qrank knows the formats {', '.join(formats())}: convert the model again, or install "
            "the qrank that wrote it"
        )
    return known


def named(manifest: Manifest, backend: str) -> list[tuple[Variant, str]]:
    """The variants that a backend argument selects, each with the backend that runs it.

    Args:
        manifest: the bundle's.
        backend: a format (`onnx`), a variant (`onnx-fp32`), another package's backend, with or
            without a variant (`name/onnx-fp32`), or "module:function".

    Raises:
        TargetError: the bundle has no such variant, or there is no such backend.
    """
    every = list(manifest.variants.values())
    if ":" in backend:
        return [(variant, backend) for variant in every]
    meant = [v for v in every if backend in (v.format, v.name)]
    if found := [v for v in meant if format_of(v.format) is not None]:
        return [(variant, variant.format) for variant in found]
    name, _, variant = backend.partition("/")
    if name not in BACKENDS and name in others():
        readable = reads(name)
        if found := [v for v in every if v.format in readable and variant in ("", v.name)]:
            return [(variant, name) for variant in found]
    raise TargetError(
        f"the bundle {manifest.name} has no variant for backend {backend!r}; it has: "
        f"{', '.join(manifest.variants)}; backends are: {', '.join((*BACKENDS, *others()))}"
    )


def expected(target: Target) -> tuple[float, int]:
    """Sort key: smaller for targets that are expected to be faster."""
    return _rank(target.variant.format, target.variant.precision, target.device)


def _rank(format: str, precision: str, device: str) -> tuple[float, int]:
    known = format_of(format)
    found = known and known.precision(precision)
    place = math.inf
    if found:
        place = found.cpu if device == "cpu" else found.elsewhere
    return place, [*BACKENDS, format].index(format)


def convertible(backend: str | None, device: str | None) -> list[tuple[str, str]]:
    """What a checkpoint can be converted to, as (format, precision), the expected fastest first.

    Args:
        backend: as for `named`; None: any.
        device: as for `guesses`.

    Raises:
        TargetError: there is no such backend, or none that knows such a device.
    """
    device = device or "cpu"
    every = [(name, made) for name, format in formats().items() for made in format.made]
    found = every
    if backend is not None and ":" not in backend:
        known = [v for v in every if backend == "-".join(v)]
        known = known or [v for v in every if backend == v[0]]
        name, _, variant = backend.partition("/")
        if not known and name not in BACKENDS and name in others():
            readable = reads(name)
            known = [v for v in every if v[0] in readable and variant in ("", "-".join(v))]
        if not known:
            names = ", ".join("-".join(v) for v in every)
            raise TargetError(
                f"no checkpoint can be converted for backend {backend!r}; it can be converted to: "
                f"{names}; backends are: {', '.join((*BACKENDS, *others()))}"
            )
        found = known
    fitting = [v for v in found if kind(device) in spec(v[0]).kinds]
    if not fitting:
        kinds = {name: ", ".join(spec(name).kinds) for name in dict.fromkeys(v[0] for v in found)}
        raise TargetError(
            f"no device {device!r} for a converted model; formats may have: "
            + "; ".join(f"{name} {known}" for name, known in kinds.items())
        )
    return sorted(fitting, key=lambda v: _rank(v[0], v[1], device))
