"""A cascade of `mini` behind a smaller model: nDCG@10 and time, and whether budgets are kept.

The smaller model is `mini` itself, limited to `--tokens` of a pair: the query and the beginning of
the document. (Cut to fewer layers and not trained again, `mini` ranks worse than BM25.)

Logits are kept, so the script goes on where it was interrupted. "composed" is the time that
`qrank eval` states, "measured" that of `Cascade.rank`. "kept" is the share of requests that took
110 % of the budget or less, after some from which the speed is learnt. "small p50" and "large p50"
are the documents that each stage scored.
"""

from __future__ import annotations

import time
from argparse import Namespace
from functools import partial

import numpy as np
from common import alternate, arguments, report

from qrank import Cascade, Reranker
from qrank.bundle.locate import DEFAULT
from qrank.quality.bm25 import Run
from qrank.quality.cascade_evaluation import KEEPS, evaluate_cascade
from qrank.quality.collection import Collection
from qrank.quality.score_cache import Setting

WARM_UP = 10
FRONTIER = {
    "run": "",
    "nDCG@10": ".3f",
    "difference": "+.3f",
    "ms composed": ".0f",
    "ms measured": ".0f",
}
EXITS = {"error": "g", "rescored": ".1f", "same top": ".1%"}
BUDGETS = {
    "budget ms": "d",
    "requests": "d",
    "kept": ".1%",
    "p95 of it": ".0%",
    "small p50": ".0f",
    "large p50": ".0f",
}


def frontier(options: Namespace, collection: Collection, candidates: Run) -> None:
    """Print what `qrank eval` composes, beside measured times, and the early exit."""
    evaluation = evaluate_cascade(
        [DEFAULT, DEFAULT],
        collection,
        candidates,
        [Setting(max_length=options.tokens), Setting()],
        first="BM25",
        top_k=options.top_k,
    )
    queries = list(candidates)[: options.timed]
    seconds = {}
    with Reranker(DEFAULT, max_length=options.tokens) as small, Reranker(DEFAULT) as large:
        cases: dict[str, Reranker | Cascade] = {"small": small, "large": large}
        cases |= {f"keep {keep}": Cascade([small, large], keep) for keep in KEEPS}

        def rank(one: Reranker | Cascade) -> None:
            for query in queries:
                texts = [collection.documents[name] for name in candidates[query]]
                one.rank(collection.queries[query], texts)

        runs = {name: partial(rank, one) for name, one in cases.items()}
        seconds = alternate(runs, options.rounds)
        target = large.target.name
    rows = [
        {
            "run": row.name,
            "nDCG@10": row.measures["nDCG@10"],
            "difference": None if row.difference is None else row.difference.mean,
            "ms composed": row.milliseconds,
            "ms measured": None
            if row.name not in seconds
            else 1000 * float(np.median(seconds[row.name])) / len(queries),
        }
        for row in evaluation.rows
    ]
    title = (
        f"{DEFAULT} behind itself with {options.tokens} tokens: {target}, {len(candidates)} "
        f"queries, {options.depth} candidates; {len(queries)} queries timed"
    )
    report(title, FRONTIER, rows, as_json=options.json)
    exits = [
        {"error": each.error, "rescored": each.rescored, "same top": each.agreement}
        for each in evaluation.exits
    ]
    title = (
        f"Early exit: top {evaluation.top_k} of {evaluation.keep} kept, fitted on "
        f"{evaluation.fit} queries, measured on {evaluation.held_out} others"
    )
    report(title, EXITS, exits, as_json=options.json)


def budgets(options: Namespace, collection: Collection, candidates: Run) -> None:
    """Rank under every budget, with a new cascade for each, and print the results."""
    queries = list(candidates)[: options.queries + WARM_UP]
    rows = []
    for budget in options.budgets:
        small = Reranker(DEFAULT, max_length=options.tokens)
        with Cascade([small, DEFAULT], options.keep) as cascade:
            took, counts = [], []
            for query in queries:
                texts = [collection.documents[name] for name in candidates[query]]
                start = time.perf_counter()
                ranking = cascade.rank(collection.queries[query], texts, budget_ms=budget)
                took.append((time.perf_counter() - start) * 1000 / budget)
                counts.append(ranking.stage_counts)
        shares, scored = np.array(took[WARM_UP:]), np.array(counts[WARM_UP:])
        rows.append(
            {
                "budget ms": budget,
                "requests": len(shares),
                "kept": float(np.mean(shares <= 1.1)),
                "p95 of it": float(np.percentile(shares, 95)),
                "small p50": float(np.median(scored[:, 0])),
                "large p50": float(np.median(scored[:, 1])),
            }
        )
    title = f"Budgets: {options.depth} documents, keep {options.keep}"
    report(title, BUDGETS, rows, as_json=options.json)


def main() -> None:
    """Print the tables."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--tokens", type=int, default=96, help="[default: %(default)s]")
    parser.add_argument("--depth", type=int, default=100, help="candidates  [default: %(default)s]")
    parser.add_argument("--max-queries", type=int, help="to judge  [default: all]")
    parser.add_argument("--top-k", type=int, default=10, help="to settle  [default: %(default)s]")
    parser.add_argument("--timed", type=int, default=2, help="queries  [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="of them  [default: %(default)s]")
    parser.add_argument("--keep", type=int, default=20, help="of budgets  [default: %(default)s]")
    parser.add_argument(
        "--queries", type=int, default=30, help="of budgets  [default: %(default)s]"
    )
    parser.add_argument("--budgets", type=int, nargs="*", default=[300, 600, 1000])
    options = parser.parse_args()
    collection = Collection.read(options.data)
    candidates = collection.bm25(options.depth, options.max_queries)
    if options.timed:
        frontier(options, collection, candidates)
    if options.budgets:
        budgets(options, collection, candidates)


if __name__ == "__main__":
    main()
