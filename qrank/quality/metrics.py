"""Measures of a document order, and the significance of a difference between two orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.fidelity import Fidelity
from qrank.bundle.sequences import Logits
from qrank.system.extras import need

Order = Mapping[str, Sequence[str]]
"""Query id -> document ids, best first."""

Qrels = Mapping[str, Mapping[str, int]]
"""Query id -> document id -> relevance; documents that are missing are not relevant."""

Values = NDArray[np.float64]
"""One number per query, shape [queries]."""

MAIN = "nDCG@10"
"""The measure that differences are computed for."""

MEASURES = (MAIN, "MRR@10", "MAP", "R@10")
"""Names of the measures, as ir_measures parses them."""

CONFIDENCE = 0.95
"""Confidence level of intervals."""


def measure(qrels: Qrels, order: Order, names: Sequence[str] = MEASURES) -> dict[str, Values]:
    """Measures of every query of an order, by ir_measures.

    Documents count in the order given, so that ids do not break ties between scores.

    Args:
        qrels: judgements of every query.
        order: what is measured; a query without documents has 0 in every measure.
        names: names of the measures, as ir_measures parses them.

    Returns:
        Measure -> values in the queries' order.
    """
    ir_measures = need("ir_measures")
    run = {
        query: {document: float(-rank) for rank, document in enumerate(documents)}
        for query, documents in order.items()
    }
    parsed = {ir_measures.parse_measure(name): name for name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    judged = {query: dict(qrels[query]) for query in order}
    for metric in ir_measures.iter_calc(list(parsed), judged, run):
        found[parsed[metric.measure]][metric.query_id] = metric.value
    return {
        name: np.array([values.get(query, 0.0) for query in order])
        for name, values in found.items()
    }


@dataclass(frozen=True)
class Difference:
    """The mean difference of two paired samples.

    Attributes:
        mean: mean of the differences.
        margin: half the width of the 95 % interval around it, by Student's t; None for one pair.
        p: p-value of a two-sided paired t-test; None for one pair.
    """

    mean: float
    margin: float | None
    p: float | None

    @classmethod
    def of(cls, ours: Values, theirs: Values) -> Difference:
        """Ours minus theirs, both of shape [n]."""
        stats: Any = need("scipy.stats")
        gains = ours - theirs
        mean = float(gains.mean())
        if len(gains) < 2:
            return cls(mean, None, None)
        if not np.ptp(gains) or not gains.var():
            # All equal, or so close that the variance is 0: scipy's test would divide by zero.
            return cls(mean, 0.0, 1.0 if mean == 0 else 0.0)
        test = stats.ttest_rel(ours, theirs)
        interval = test.confidence_interval(CONFIDENCE)
        return cls(mean, float(interval.high - interval.low) / 2, float(test.pvalue))


def kendall(ours: Mapping[str, Logits], theirs: Mapping[str, Logits]) -> float | None:
    """Kendall's tau-b of two targets' logits for the same candidates, mean over queries.

    Returns:
        None if no query has two candidates.
    """
    pairs = [(ours[query], theirs[query]) for query in ours if len(ours[query]) > 1]
    return float(np.mean([Fidelity.of(*pair).kendall for pair in pairs])) if pairs else None


def overlap(ours: Order, theirs: Order, top: int = 10, within: int | None = None) -> float | None:
    """Share of our first `top` documents that are in their first `within`, mean over queries.

    Args:
        ours: an order; queries without documents do not count.
        theirs: an order of the same queries.
        top: number of documents of ours.
        within: number of documents of theirs. None: `top`.

    Returns:
        None if no query has documents.
    """
    shares = [
        len(set(documents[:top]) & set(theirs[query][: within or top])) / len(documents[:top])
        for query, documents in ours.items()
        if documents
    ]
    return float(np.mean(shares)) if shares else None
