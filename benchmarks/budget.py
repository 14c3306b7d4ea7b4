"""Whether `rank(budget_ms=)` keeps to its budget, and uses it.

The documents are BM25's best 100 for each query. The first requests, from which the speed is
learnt, do not count. "kept" is the share of requests that took 110 % of the budget or less. Of the
requests that left documents unscored, "used" is the share that used 70 % or more of the budget, and
"least" is the smallest part of it that one used.
"""

from __future__ import annotations

import time

import numpy as np
from common import arguments, report

from qrank import Reranker
from qrank.bundle.locate import DEFAULT
from qrank.quality.collection import Collection

COLUMNS = {
    "budget ms": "d",
    "requests": "d",
    "kept": ".1%",
    "p95 of it": ".0%",
    "used": ".1%",
    "least": ".0%",
    "scored p50": ".0f",
}
WARM_UP = 10


def main() -> None:
    """Rank under every budget, with a new reranker for each, and print the results."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--backend", help="variant  [default: the best target]")
    parser.add_argument("--queries", type=int, default=60, help="queries  [default: %(default)s]")
    parser.add_argument("--budgets", type=int, nargs="+", default=[200, 500, 1000])
    options = parser.parse_args()
    collection = Collection.read(options.data)
    found = collection.bm25(100)
    queries = list(collection.queries)[: options.queries + WARM_UP]
    rows = []
    target = ""
    for budget in options.budgets:
        with Reranker(options.model, backend=options.backend) as reranker:
            target = reranker.target.name
            took, scored = [], []
            for query in queries:
                documents = [collection.documents[d] for d in found[query]]
                start = time.perf_counter()
                ranking = reranker.rank(collection.queries[query], documents, budget_ms=budget)
                took.append((time.perf_counter() - start) * 1000 / budget)
                scored.append(ranking.scored_count)
        shares, counts = np.array(took[WARM_UP:]), np.array(scored[WARM_UP:])
        waiting = shares[counts < 100]
        rows.append(
            {
                "budget ms": budget,
                "requests": len(shares),
                "kept": float(np.mean(shares <= 1.1)),
                "p95 of it": float(np.percentile(shares, 95)),
                "used": float(np.mean(waiting >= 0.7)) if len(waiting) else None,
                "least": float(waiting.min()) if len(waiting) else None,
                "scored p50": float(np.median(counts)),
            }
        )
    report(f"Budgets: {target}, 100 documents", COLUMNS, rows, as_json=options.json)


if __name__ == "__main__":
    main()
