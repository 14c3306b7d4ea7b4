"""What variants were found to lose against fp32: written by `qrank eval`, for whoever chooses."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qrank import paths
from qrank.bundle import Manifest

_NAME = "losses"


@dataclass(frozen=True)
class Loss:
    """nDCG@10 that a variant lost against its fp32 original.

    Attributes:
        mean: over queries; negative for a gain.
        margin: half its 95 % interval.
        queries: how many were measured.
        data: the collection's name.
    """

    mean: float
    margin: float
    queries: int
    data: str


def losses(manifest: Manifest) -> dict[str, Loss]:
    """Variant's name -> its loss, of those variants of a bundle that were measured here."""
    known = paths.recall(_NAME)
    found = {name: known.get(manifest.identity(v)) for name, v in manifest.variants.items()}
    return {name: Loss(**content) for name, content in found.items() if content is not None}


def remember(manifest: Manifest, found: dict[str, Loss]) -> None:
    """Keep losses of a bundle's variants; one of fewer queries replaces none of more."""
    known = losses(manifest)
    better = {
        manifest.identity(manifest.variants[name]): asdict(loss)
        for name, loss in found.items()
        if name not in known or known[name].queries <= loss.queries
    }
    paths.remember(_NAME, {**paths.recall(_NAME), **better})
