"""How far a variant ranks like the original: the same passages, ordered by both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrank.bundle.fidelity import Fidelity

TOP = 10
"""Length of the top of a ranking that counts; queries need more passages than this."""

LEAST = 0.995
"""Agreement that a conversion requires, and below which a variant is taken last. It separates
variants that lose clearly from the others, not 0.02 nDCG@10 from 0.005 (docs/benchmarks.md)."""


@dataclass(frozen=True)
class RankingData:
    """Queries, and the passages that each of them ranks.

    Attributes:
        name: their name in the manifest.
        queries: queries and their passages.
        files: the files that they were read from.
    """

    name: str
    queries: Sequence[tuple[str, Sequence[str]]]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Reference:
    """The original's logits on ranking data.

    Attributes:
        data: name of the data.
        digest: sha256 over the token ids of all pairs.
        logits: of each query's passages.
    """

    data: str
    digest: str
    logits: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Reject field types and values that a damaged manifest may hold.

        Raises:
            ValueError: a query has too few logits, or one that is not finite, or all are the same.
        """
        if not isinstance(self.data, str) or not isinstance(self.digest, str):
            raise ValueError("data and digest of the ranking must be texts")
        for query in self.logits:
            logits = np.asarray(query, np.float64)
            if logits.size <= TOP or not np.isfinite(logits).all() or not np.ptp(logits):
                raise ValueError("the logits of a query of the ranking do not rank its passages")


@dataclass(frozen=True)
class Agreement:
    """A variant's rankings compared with the original's: means over queries.

    Attributes:
        kendall: Kendall's tau-b of all passages of a query, -1 to 1.
        top10: share of the original's ten best passages that are among the variant's, 0 to 1.
        ndcg: nDCG@10 of the variant's ranking, with the original's scores as gains, 0 to 1. A
            query's gains are its logits, scaled linearly so that the lowest is 0 and the highest 1.
        queries: number of queries.
        pairs: number of pairs of a query and a passage.
        data: name of the queries and passages.
    """

    kendall: float
    top10: float
    ndcg: float
    queries: int
    pairs: int
    data: str

    def __post_init__(self) -> None:
        """Reject field types and values that a damaged manifest may hold.

        Raises:
            ValueError: a field is not what it should be.
        """
        means = (self.kendall, self.top10, self.ndcg)
        if not all(isinstance(x, int | float) and -1 <= x <= 1 for x in means):
            raise ValueError(f"kendall, top10 and ndcg must be -1 to 1, not {means}")
        if type(self.queries) is not int or type(self.pairs) is not int or self.queries < 1:
            raise ValueError(f"queries and pairs are counts, not {self.queries}, {self.pairs}")
        if not isinstance(self.data, str):
            raise ValueError(f"data must be a text, not {self.data!r}")

    @classmethod
    def of(
        cls, logits: Sequence[ArrayLike], reference: Sequence[ArrayLike], data: str = ""
    ) -> Agreement:
        """Compare rankings.

        Args:
            logits: a variant's, of each query's passages in the same order as `reference`.
            reference: the original's; for each query two or more, not all the same.
            data: see the class.

        Raises:
            ValueError: a logit of the variant is not finite.
        """
        found = [
            _compared(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
            for ours, theirs in zip(logits, reference, strict=True)
        ]
        kendall, top10, ndcg = (min(float(x), 1.0) for x in np.mean(found, axis=0))
        pairs = sum(np.size(theirs) for theirs in reference)
        return cls(max(kendall, -1.0), top10, ndcg, len(found), pairs, data)

    def shortfall(self, least: float) -> str | None:
        """The figures and the bound, if `ndcg` misses it; None otherwise."""
        if self.ndcg >= least:
            return None
        return (
            f"its rankings agree {self.ndcg:.4f} with the original's (nDCG@10, the original's "
            f"scores as gains; at least {least:g} needed), share {self.top10:.0%} of the top 10 "
            f"and have a Kendall tau of {self.kendall:.3f}, on {self.queries} queries x "
            f"{self.pairs / self.queries:.0f} passages ({self.data})"
        )


def _compared(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, float, float]:
    """Tau, overlap of the top and nDCG of one query. Ties keep the passages' order, as in `rank`.

    nDCG: K. Järvelin, J. Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002, with
    the discount 1 / log2(rank + 1).
    """
    if not np.isfinite(ours).all():
        raise ValueError("a logit is not finite")
    top, best = (np.argsort(-x, kind="stable")[:TOP] for x in (ours, theirs))
    gains = (theirs - theirs.min()) / np.ptp(theirs)
    discounts = 1 / np.log2(np.arange(len(best)) + 2)
    ndcg = float(gains[top] @ discounts) / float(gains[best] @ discounts)
    overlap = len(set(top.tolist()) & set(best.tolist())) / len(best)
    return Fidelity.of(ours, theirs).kendall, overlap, ndcg
