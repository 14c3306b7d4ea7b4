"""Ranking quality: BM25's best 100 documents of every query, reranked by each variant.

Measured by ir_measures. "± fp32" and its p are the difference of nDCG@10 to the fp32 variant's
and a paired t-test over queries; likewise for BM25. tau is Kendall's, of a query's logits
against fp32's, the mean over queries. Recall@100 cannot change: the documents are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

import ir_measures
import numpy as np
from common import Collection, arguments, report
from ir_measures import AP, RR, R, nDCG
from scipy.stats import kendalltau, ttest_rel

from qrank import Reranker
from qrank.bundle import Manifest
from qrank.locate import DEFAULT, locate

DEPTH = 100
MEASURES = {"nDCG@10": nDCG @ 10, "MRR@10": RR @ 10, "MAP": AP, "R@100": R @ 100}
COLUMNS = {
    "run": "",
    **dict.fromkeys(MEASURES, ".3f"),
    "± BM25": "+.3f",
    "p": ".2g",
    "± fp32": "+.4f",
    "p ": ".2g",
    "tau": ".3f",
}
Run = dict[str, dict[str, float]]


def main() -> None:
    """Rerank with every variant and compare."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--reference", type=Path, help="another bundle, which has the fp32 variant")
    parser.add_argument("--queries", type=int, help="only the first so many  [default: all]")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data FOLDER is needed")
    collection = Collection.read(options.data)
    first = collection.bm25(DEPTH)
    queries = list(first)[: options.queries]
    bm25 = {query: first[query] for query in queries}
    bundles = [options.model] if options.reference is None else [options.reference, options.model]
    runs: dict[str, Run] = {}
    for bundle in bundles:
        for name in sorted(Manifest.load(locate(bundle)).variants, key=lambda v: "fp32" not in v):
            if name not in runs:
                sys.stderr.write(f"{bundle}, {name}\n")
                with Reranker(bundle, backend=name) as reranker:
                    runs[name] = _rerank(reranker, collection, bm25)

    values = {name: _evaluate(collection, run) for name, run in {"BM25": bm25, **runs}.items()}
    fp32 = next((name for name in runs if name.endswith("fp32")), None)
    rows = []
    for name, by_measure in values.items():
        row: dict[str, object] = {"run": name}
        row |= {measure: mean(found) for measure, found in by_measure.items()}
        if name != "BM25":
            row["± BM25"], row["p"] = _compare(by_measure, values["BM25"])
        if fp32 is not None and name not in ("BM25", fp32):
            row["± fp32"], row["p "] = _compare(by_measure, values[fp32])
            row["tau"] = mean(_tau(runs[name][query], runs[fp32][query]) for query in queries)
        rows.append(row)
    title = (
        f"Quality of {options.model}: {len(queries)} queries of {options.data.name}, top {DEPTH}"
    )
    report(title, COLUMNS, rows, as_json=options.json)


def _rerank(reranker: Reranker, collection: Collection, first: Run) -> Run:
    """Logits: they order and tie as the model means it."""
    reranked: Run = {}
    for query, found in first.items():
        pairs = [(collection.queries[query], collection.documents[name]) for name in found]
        logits = reranker.score(pairs, raw=True)
        reranked[query] = dict(zip(found, logits.tolist(), strict=True))
    return reranked


def _evaluate(collection: Collection, run: Run) -> dict[str, list[float]]:
    """Each measure's value for every query of the run, in its order."""
    qrels = {query: collection.qrels[query] for query in run}
    found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    names = {str(measure): name for name, measure in MEASURES.items()}
    for metric in ir_measures.iter_calc(list(MEASURES.values()), qrels, run):
        found[names[str(metric.measure)]][metric.query_id] = metric.value
    return {name: [values[query] for query in run] for name, values in found.items()}


def _compare(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> tuple[float, float]:
    """Difference of nDCG@10, and the p of a paired t-test."""
    a, b = np.array(ours["nDCG@10"]), np.array(theirs["nDCG@10"])
    return float((a - b).mean()), float(ttest_rel(a, b).pvalue)


def _tau(ours: dict[str, float], theirs: dict[str, float]) -> float:
    return float(kendalltau(list(ours.values()), [theirs[name] for name in ours]).statistic)


if __name__ == "__main__":
    main()
