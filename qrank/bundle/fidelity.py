"""How close logits are to the fp32 reference, and how close they must be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Fidelity:
    """One variant's logits compared with the reference's, over the probes.

    Attributes:
        max_abs: largest absolute difference between a logit and the reference's.
        spread: largest minus smallest reference logit: the scale for `max_abs`.
        spearman: rank correlation, -1 to 1.
        kendall: Kendall's tau-b, -1 to 1.
    """

    max_abs: float
    spread: float
    spearman: float
    kendall: float

    @classmethod
    def of(cls, logits: ArrayLike, reference: ArrayLike) -> Fidelity:
        """Compare logits with the reference's; both have shape [n]."""
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
    """The limits for a precision: `max_abs` as a share of the spread, and lowest Kendall's tau."""

    share: float
    kendall: float = -1.0

    def shortfall(self, fidelity: Fidelity) -> str | None:
        """Which limits are missed, with the values found and required; None if none is."""
        bound = self.share * max(1.0, fidelity.spread)
        missed = []
        # Written so that NaN fails.
        if not fidelity.max_abs <= bound:
            missed.append(f"max |Δlogit| is {fidelity.max_abs:.4g}, at most {bound:.4g} allowed")
        if not fidelity.kendall >= self.kendall:
            missed.append(
                f"Kendall tau is {fidelity.kendall:.3f}, at least {self.kendall:.3f} needed"
            )
        return "; ".join(missed) or None


# Relative to the model: shares of max(1, spread of the reference logits).
FLOAT32 = Tolerance(1e-4)
FLOAT16 = Tolerance(1e-2)
BFLOAT16 = Tolerance(5e-2)
EIGHT_BITS = Tolerance(0.15, 0.9)
FOUR_BITS = Tolerance(0.3, 0.8)

_FEW = 0.5
"""Lowest Kendall's tau on a few short probes, where it says little: a backend that returns constant
or arbitrary numbers has about 0."""


def here(own: Tolerance, *, exact: bool) -> Tolerance:
    """The tolerance for a variant on a user's machine.

    Args:
        own: the tolerance of a conversion to its precision.
        exact: whether it computes in the data type that the conversion was proven in. If so, it is
            checked on a few probes, mainly by the differences of logits. If not, it is checked on
            all probes, and may differ by half of the tolerance, or half of int8's if that is more:
            bf16 on fp16 weights is as far from the original as bf16 on any weights.
    """
    if exact:
        return Tolerance(own.share, _FEW)
    bars = [bar for bar in (own.kendall, EIGHT_BITS.kendall) if bar > -1]
    return Tolerance(max(own.share, EIGHT_BITS.share) / 2, min(bars))


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; ties get their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return ranks


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's correlation; 0 if one side is constant, as it is then undefined."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def _kendall(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Kendall's tau-b: the correlation of the signs of all pairwise differences."""
    upper = np.triu_indices(len(a), 1)
    with np.errstate(invalid="ignore"):  # two infinite numbers have no difference
        signs_a = np.sign(a[:, None] - a[None, :])[upper]
        signs_b = np.sign(b[:, None] - b[None, :])[upper]
    norm = float(np.sqrt((signs_a @ signs_a) * (signs_b @ signs_b)))
    return float(signs_a @ signs_b) / norm if norm else 0.0
