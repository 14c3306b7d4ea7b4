"""Time and memory by number of pairs: time per token and peak memory should not grow.

Each number of pairs is scored by `Reranker.score` in a fresh process, in one call (a small number
several times), of pairs of uneven length. Peak memory is given beyond what the texts themselves
take.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from common import arguments, report

from qrank import Reranker
from qrank.bundle.locate import DEFAULT
from qrank.reranker import SCORED_AT_ONCE
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.system.machine import peak_memory, processors

WORDS = "aero boundary flow heat layer mach number plate shock wave wing the of a in on at".split()
LEAST = 10_000
"""Pairs that are timed at least, in several calls if need be."""

COLUMNS = {
    "pairs": ",d",
    "tokens": ",d",
    "pairs/s": ",.0f",
    "us per token": ".2f",
    "vs least": "+.1%",
    "peak MB": ",.1f",
    "peak vs least": "+.1%",
}


def main() -> None:
    """Score each number of pairs, and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--backend", help="variant  [default: the chosen one]")
    parser.add_argument("--counts", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=1, help="in which the counts take turns")
    parser.add_argument("--words", type=int, default=12, help="of the longest document")
    parser.add_argument("--child", type=int, help="(internal)")
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(_scored(options)))
        return
    given = ["--model", options.model, "--words", str(options.words)]
    given += ["--backend", options.backend] if options.backend else []
    found: dict[int, list[dict[str, float]]] = {count: [] for count in options.counts}
    for count in options.counts * options.rounds:
        command = [sys.executable, __file__, *given, "--child", str(count)]
        found[count].append(json.loads(subprocess.check_output(command)))
    rows = [
        {"pairs": count, **{name: statistics.median(run[name] for run in runs) for name in runs[0]}}
        for count, runs in found.items()
    ]
    for row in rows:
        row["us per token"] = row["seconds"] / row["tokens"] * 1e6
        row["pairs/s"] = row["pairs"] / row["seconds"]
        row["vs least"] = row["us per token"] / rows[0]["us per token"] - 1
        row["peak vs least"] = row["peak MB"] / rows[0]["peak MB"] - 1
    title = f"Scoring {options.model} in one call, {processors()} threads"
    report(title, COLUMNS, rows, as_json=options.json)


def _pairs(count: int, words: int) -> Iterator[tuple[str, str]]:
    """Pairs of one query in ten; a document has a third to all of the words."""
    for number in range(count):
        length = words - number * 7 % (words * 2 // 3 + 1)
        document = " ".join(WORDS[(number * 5 + place * 3) % len(WORDS)] for place in range(length))
        yield f"heat of plate {number // 10 % 97}", document


def _scored(options: object) -> dict[str, float]:
    """Seconds and peak memory of scoring all pairs, and how many tokens they have."""
    count, words = vars(options)["child"], vars(options)["words"]
    with Reranker(vars(options)["model"], backend=vars(options)["backend"]) as reranker:
        # Kernels for every length, and the memory that a full step takes.
        reranker.score(_pairs(SCORED_AT_ONCE, words))
        texts = list(_pairs(count, words))
        size = sum(sys.getsizeof(text) for pair in texts for text in (pair, *pair))
        calls = -(-LEAST // count)
        begun = time.perf_counter()
        for _ in range(calls):
            reranker.score(texts)
        seconds = (time.perf_counter() - begun) / calls
        peak = (peak_memory() or 0) - size
        tokens = _tokens(reranker, texts[:1000]) * (count / min(count, 1000))
    return {"seconds": seconds, "tokens": int(tokens), "peak MB": peak / 1e6}


def _tokens(reranker: Reranker, pairs: list[tuple[str, str]]) -> int:
    bundle = reranker.engine.bundle
    tokenizer = PairTokenizer(bundle.tokenizer, bundle.manifest.family)
    return sum(len(tokenizer.whole(*pair)[0]) for pair in pairs)


if __name__ == "__main__":
    main()
