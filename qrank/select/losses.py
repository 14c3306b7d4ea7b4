"""nDCG@10 that variants lose against fp32: written by `qrank eval`, read by target selection."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qrank.bundle.manifest import Manifest, Variant
from qrank.select.targets import Target
from qrank.system import cache

_KIND = "losses"


@dataclass(frozen=True)
class Loss:
    """nDCG@10 that a variant lost against its fp32 original.

    Attributes:
        mean: mean over queries; negative for a gain.
        margin: half the width of its 95 % interval.
        queries: number of queries measured.
        data: the collection's name.
    """

    mean: float
    margin: float
    queries: int
    data: str

    def __post_init__(self) -> None:
        """Reject field types that a damaged file may hold."""
        numbers = (self.mean, self.margin, self.queries)
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"mean, margin and queries are numbers, not {numbers}")


def losses(manifest: Manifest, device: str = "cpu") -> dict[str, Loss]:
    """Variant name -> loss, for the variants measured on this machine on a device."""
    found = {
        name: cache.load(_KIND, _key(manifest, variant, device), Loss)
        for name, variant in manifest.variants.items()
    }
    return {name: loss for name, loss in found.items() if loss is not None}


def remember(manifest: Manifest, found: dict[str, Loss], device: str = "cpu") -> None:
    """Store losses of variants; a loss over fewer queries never replaces one over more."""
    known = losses(manifest, device)
    for name, loss in found.items():
        if name not in known or known[name].queries <= loss.queries:
            key = _key(manifest, manifest.variants[name], device)
            cache.store(_KIND, key, asdict(loss))


def _key(manifest: Manifest, variant: Variant, device: str) -> dict[str, Any]:
    return Target(variant, device, variant.format).cache_key(manifest)
