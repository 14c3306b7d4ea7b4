"""Measurements of targets on this machine, and the cache that stores them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qrank.backends import keys
from qrank.bundle.manifest import Manifest
from qrank.select.targets import TargetKey
from qrank.system import cache

Profile = Literal["short", "passages", "long"]

PROFILES: dict[Profile, tuple[int, int]] = {
    "short": (1, 32),
    "passages": (20, 128),
    "long": (100, 512),
}
"""Profile that targets are timed on -> number of documents, and tokens per (query, document)."""

_KIND = "measurements"


@dataclass(frozen=True)
class Measurement:
    """How a target performs on this machine in one setting, or why it cannot be used.

    Attributes:
        target: the target; or a backend, if none of its targets can be used.
        reason: why it cannot be used; None if it can.
        compute_dtype: data type it computes in; None if there is no choice.
        threads: CPU threads it ran with.
        max_batch_tokens: padded tokens per batch it ran with; None: the backend's default.
        speeds: pairs per second, by profile.
        load: seconds to open it.
        kendall: Kendall's tau against the original, on the bundle's probes.
        bytes: size of its files.
    """

    target: TargetKey
    reason: str | None = None
    compute_dtype: str | None = None
    threads: int = 1
    max_batch_tokens: int | None = None
    speeds: dict[str, float] = field(default_factory=dict)
    load: float = 0.0
    kendall: float = -1.0
    bytes: int = 0

    def check(self, manifest: Manifest) -> None:
        """Check that it belongs to a bundle and is complete: a damaged file's may not be.

        Raises:
            ValueError, TypeError: it does not, or is not.
        """
        if self.reason is not None:
            return
        if self.target.variant not in manifest.variants:
            raise ValueError(f"the bundle has no {self.target.variant}")
        speeds = [self.speeds[profile] for profile in PROFILES if profile in self.speeds]
        if len(speeds) < len(PROFILES) or not all(0 < speed < math.inf for speed in speeds):
            raise ValueError(f"{self.target.name} has no speed for each profile: {self.speeds}")
        if not (-1 <= self.kendall <= 1 and self.threads >= 1 and self.bytes >= 0):
            raise ValueError(f"{self.target.name} has a number out of its range")

    def speed(self, profile: Profile) -> float:
        """Pairs per second."""
        return self.speeds[profile]

    @property
    def setting(self) -> str:
        """The setting that distinguishes the target's measurements, for display; often ""."""
        batch = f"{self.max_batch_tokens} a batch" if self.max_batch_tokens else ""
        return ", ".join(part for part in (self.compute_dtype, batch) if part)


def recalled(manifest: Manifest, threads: int) -> list[Measurement]:
    """Stored measurements of a bundle for this machine's current state; [] if there are none."""

    def read(targets: Any) -> list[Measurement]:
        if not isinstance(targets, list):
            raise TypeError(f"targets is a {type(targets).__name__}, not a list")
        found = [Measurement(**{**m, "target": TargetKey(**m["target"])}) for m in targets]
        for measurement in found:
            measurement.check(manifest)
        return found

    return cache.load(_KIND, keys.of_machine(manifest, threads=threads), read) or []


def remember(manifest: Manifest, threads: int, measured: Iterable[Measurement]) -> None:
    """Store measurements, if there is a cache."""
    content = {"targets": [asdict(m) for m in measured]}
    cache.store(_KIND, keys.of_machine(manifest, threads=threads), content)
