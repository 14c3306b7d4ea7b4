"""Which batch size and which use of the CPU's threads scores the most pairs per second.

First table: padded tokens per batch (`CPU_BATCHES` in qrank/scoring/batching.py) for one and for
several streams over one session with all threads. Second table: that design compared with one
stream, and with a session of one thread. "mixed" is whole documents, "short" is their first 20
words; "one pair" is the latency of a single whole document.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from common import alternate, arguments, encode, join, open_onnx, report

from qrank.backends.onnx import OnnxBackend
from qrank.bundle.locate import DEFAULT, locate
from qrank.bundle.sequences import Sequences
from qrank.quality.collection import Collection
from qrank.scoring.batching import CPU_BATCHES
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.system.machine import processors


def main() -> None:
    """Run all cells in turns, and print medians."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--precision", default="int8", help="[default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=9, help="[default: %(default)s]")
    parser.add_argument("--pairs", type=int, default=48, help="[default: %(default)s]")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64, 96, 128, 160, 224, 320, 512, 1024]
    )
    options = parser.parse_args()
    bundle = locate(options.model)
    encoder = PairTokenizer(bundle.tokenizer, bundle.manifest.family)
    works = _works(Collection.read(options.data), encoder, options.pairs)
    threads = options.threads
    label = f"{options.model}, {options.precision}, {threads} threads"
    opened = partial(open_onnx, bundle.folder, options.precision)

    streams = sorted({1, threads})
    backends = {n: opened(threads=threads, streams=n) for n in streams}
    measured = {(batch, n): (backends[n], batch) for batch in options.batches for n in streams}
    speeds = _speeds(measured, works, options.rounds)
    columns = {f"{name}, {n} streams": (n, name) for name in ("mixed", "short") for n in streams}
    report(
        f"Pairs/s by batch and streams: {label}",
        {"padded tokens": "", **dict.fromkeys(columns, ",.0f")},
        [
            {"padded tokens": str(batch)}
            | {column: speeds[(batch, n), name] for column, (n, name) in columns.items()}
            for batch in options.batches
        ],
        as_json=options.json,
    )

    designs = {
        f"all threads in the session, {threads} streams": (threads, threads),
        "all threads in the session, 1 stream": (threads, 1),
        f"one thread in the session, {threads} streams": (1, threads),
    }
    speeds = _speeds(
        {name: (opened(threads=t, streams=n), CPU_BATCHES[0]) for name, (t, n) in designs.items()},
        works,
        options.rounds,
    )
    report(
        f"Pairs/s and latency by use of threads, batches of {CPU_BATCHES[0]}: {label}",
        {"design": "", "mixed": ",.0f", "short": ",.0f", "one pair ms": ".1f"},
        [
            {
                "design": name,
                "mixed": speeds[name, "mixed"],
                "short": speeds[name, "short"],
                "one pair ms": 1000 / speeds[name, "one pair"],
            }
            for name in designs
        ],
        as_json=options.json,
    )


def _speeds(
    measured: Mapping[Any, tuple[OnnxBackend, int]], works: Mapping[str, Sequences], rounds: int
) -> dict[Any, float]:
    """Median pairs per second of every (backend, padded tokens per batch) with every work."""

    def run(backend: OnnxBackend, batch: int, work: Sequences) -> None:
        backend._batch = batch
        backend.logits(work)

    cases = {
        (key, name): partial(run, backend, batch, work)
        for key, (backend, batch) in measured.items()
        for name, work in works.items()
    }
    seconds = alternate(cases, rounds)
    return {(key, name): len(works[name]) / median(found) for (key, name), found in seconds.items()}


def _works(collection: Collection, tokenizer: PairTokenizer, pairs: int) -> dict[str, Sequences]:
    """The pairs for each column of the table."""
    queries = list(collection.queries)[:4]
    found = collection.bm25(max(pairs // len(queries), 1))
    texts = {q: [collection.documents[d] for d in found[q]] for q in queries}
    asked = collection.queries
    mixed = join([encode(tokenizer, asked[q], texts[q]) for q in queries])
    short = join(
        [encode(tokenizer, asked[q], [" ".join(t.split()[:20]) for t in texts[q]]) for q in queries]
    )
    middle = np.argsort(mixed.lengths)[len(mixed) // 2]
    return {"mixed": mixed, "short": short, "one pair": mixed.take(np.array([middle]))}


if __name__ == "__main__":
    main()
