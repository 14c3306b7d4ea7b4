"""How close logits are to the fp32 reference, and how close they must be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Fidelity:
    """One variant's logits against the reference's, over the probes.

    Attributes:
        max_abs: largest absolute difference of two logits.
        spread: largest minus smallest reference logit: what `max_abs` is to be seen against.
        spearman: rank correlation, -1 to 1.
        kendall: Kendall's tau-b, -1 to 1.
    """

    max_abs: float
    spread: float
    spearman: float
    kendall: float

    @classmethod
    def of(cls, logits: ArrayLike, reference: ArrayLike) -> Fidelity:
        """Compare logits with the reference's, both of shape [n]."""
        ours = np.asarray(logits, np.float64)
        theirs = np.asarray(reference, np.float64)
        return cls(
            max_abs=float(np.max(np.abs(ours - theirs))),
            spread=float(np.ptp(theirs)),
            spearman=_correlation(_ranks(ours), _ranks(theirs)),
            kendall=_kendall(ours, theirs),
        )


@dataclass(frozen=True)
class Tolerance:
    """What a precision may lose: `max_abs` as a share of the spread, and Kendall's tau."""

    share: float
    kendall: float = -1.0

    def shortfall(self, fidelity: Fidelity) -> str | None:
        """What misses the bar and by how much; None when nothing does."""
        bound = self.share * max(1.0, fidelity.spread)
        missed = []
        # Written so that NaN misses.
        if not fidelity.max_abs <= bound:
            missed.append(f"max |Δlogit| is {fidelity.max_abs:.4g}, at most {bound:.4g} allowed")
        if not fidelity.kendall >= self.kendall:
            missed.append(
                f"Kendall tau is {fidelity.kendall:.3f}, at least {self.kendall:.3f} needed"
            )
        return "; ".join(missed) or None


# They scale with the model: a share of max(1, spread of the reference logits).
FLOAT32 = Tolerance(1e-4)
FLOAT16 = Tolerance(1e-2)
BFLOAT16 = Tolerance(5e-2)
EIGHT_BITS = Tolerance(0.15, 0.9)
FOUR_BITS = Tolerance(0.3, 0.8)

_FEW = 0.5
"""Kendall's tau that is asked of a few short probes, of which it says little: what gives the same
number for everything, or numbers of its own, has about 0."""


def here(own: Tolerance, *, exact: bool) -> Tolerance:
    """What a variant may lose on a user's machine.

    Args:
        own: what a conversion to its precision may lose.
        exact: whether it computes in what the conversion was proven in. Then it is held against a
            few probes: by the differences, mostly. If not, against all of them, and half of the
            tolerance is for the arithmetic, or half of int8's where that is more: bf16 on fp16
            weights is as far from the original as bf16 on any.
    """
    if exact:
        return Tolerance(own.share, _FEW)
    bars = [bar for bar in (own.kendall, EIGHT_BITS.kendall) if bar > -1]
    return Tolerance(max(own.share, EIGHT_BITS.share) / 2, min(bars))


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, ties sharing their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return ranks


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's correlation; 0 where one side is constant: it then says nothing."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def _kendall(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Kendall's tau-b: the correlation of the signs of all pairwise differences."""
    upper = np.triu_indices(len(a), 1)
    signs_a = np.sign(a[:, None] - a[None, :])[upper]
    signs_b = np.sign(b[:, None] - b[None, :])[upper]
    norm = float(np.sqrt((signs_a @ signs_a) * (signs_b @ signs_b)))
    return float(signs_a @ signs_b) / norm if norm else 0.0
