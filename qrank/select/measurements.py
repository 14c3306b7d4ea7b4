"""What targets were found to do on this machine, and where it is remembered."""

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
"""What targets are timed on -> documents, and tokens of each with its query."""

_KIND = "measurements"


@dataclass(frozen=True)
class Measurement:
    """What a target was found to do on this machine, or why it cannot be used.

    Attributes:
        target: it; or a backend, none of whose targets can be used.
        reason: why it cannot be used; None if it can.
        compute_dtype: arithmetic it computes in; None where there is no choice.
        threads: CPU threads it was fastest with.
        max_batch_tokens: padded tokens a batch it was fastest with; None: its own choice.
        speeds: pairs a second, by profile.
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
        """See that it is one of a bundle's, and whole, as a damaged file's is not.

        Raises:
            ValueError, TypeError: it is not.
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
        """Pairs a second."""
        return self.speeds[profile]

    @property
    def setting(self) -> str:
        """What distinguishes it from the target's other measurements, for people; "" mostly."""
        batch = f"{self.max_batch_tokens} a batch" if self.max_batch_tokens else ""
        return ", ".join(part for part in (self.compute_dtype, batch) if part)


def recalled(manifest: Manifest, threads: int) -> list[Measurement]:
    """What was measured for a bundle on this machine as it is now; [] if nothing was."""

    def read(targets: Any) -> list[Measurement]:
        if not isinstance(targets, list):
            raise TypeError(f"targets is a {type(targets).__name__}, not a list")
        found = [Measurement(**{**m, "target": TargetKey(**m["target"])}) for m in targets]
        for measurement in found:
            measurement.check(manifest)
        return found

    return cache.load(_KIND, keys.of_machine(manifest, threads=threads), read) or []


def remember(manifest: Manifest, threads: int, measured: Iterable[Measurement]) -> None:
    """Keep measurements, where there is a cache."""
    content = {"targets": [asdict(m) for m in measured]}
    cache.store(_KIND, keys.of_machine(manifest, threads=threads), content)
