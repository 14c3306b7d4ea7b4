"""How good an order of documents is, and how sure a difference of two is."""

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
"""Query id -> document id -> relevance; a document that is not there is not relevant."""

Values = NDArray[np.float64]
"""One number a query, shape [queries]."""

MAIN = "nDCG@10"
"""The measure that differences are of."""

MEASURES = (MAIN, "MRR@10", "MAP", "R@10")
"""Of an order, by ir_measures."""

CONFIDENCE = 0.95
"""Of intervals."""


def measure(qrels: Qrels, order: Order, names: Sequence[str] = MEASURES) -> dict[str, Values]:
    """Measures of every query of an order, by ir_measures.

    Documents count in the order given, so that equal scores are no matter of their ids.

    Args:
        qrels: judgements of every query.
        order: what is measured; a query of no documents has 0 in every measure.
        names: of the measures, as ir_measures parses them.

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
        mean: of the differences.
        margin: half the 95 % interval around it, by Student's t; None of one pair.
        p: of a paired t-test, two-sided; None of one pair.
    """

    mean: float
    margin: float | None
    p: float | None

    @classmethod
    def of(cls, ours: Values, theirs: Values) -> Difference:
        """Ours less theirs, both of shape [n]."""
        stats: Any = need("scipy.stats")
        gains = ours - theirs
        mean = float(gains.mean())
        if len(gains) < 2:
            return cls(mean, None, None)
        if not np.ptp(gains) or not gains.var():
            # The same everywhere, or too alike for squares: scipy's test would divide by nothing.
            return cls(mean, 0.0, 1.0 if mean == 0 else 0.0)
        test = stats.ttest_rel(ours, theirs)
        interval = test.confidence_interval(CONFIDENCE)
        return cls(mean, float(interval.high - interval.low) / 2, float(test.pvalue))


def kendall(ours: Mapping[str, Logits], theirs: Mapping[str, Logits]) -> float | None:
    """Mean over queries of Kendall's tau-b of two targets' logits of the same candidates.

    Returns:
        None where no query has two candidates.
    """
    pairs = [(ours[query], theirs[query]) for query in ours if len(ours[query]) > 1]
    return float(np.mean([Fidelity.of(*pair).kendall for pair in pairs])) if pairs else None


def overlap(ours: Order, theirs: Order, top: int = 10, within: int | None = None) -> float | None:
    """Mean over queries of the share of our first `top` that are in their first `within`.

    Args:
        ours: queries without documents do not count.
        theirs: of the same queries.
        top: documents of ours.
        within: documents of theirs. None: as many.

    Returns:
        None where no query has documents.
    """
    shares = [
        len(set(documents[:top]) & set(theirs[query][: within or top])) / len(documents[:top])
        for query, documents in ours.items()
        if documents
    ]
    return float(np.mean(shares)) if shares else None
