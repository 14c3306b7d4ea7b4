"""Latency, throughput and peak memory of `Reranker.rank` with a bundle, in fresh processes.

The documents are BM25's best for each query, with `--words` their beginnings. "outside the backend"
is the share of the time in which no logits are computed: encoding (text to token ids), and making
the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from common import arguments, encode, report

from qrank import Reranker
from qrank.bundle.locate import DEFAULT, locate
from qrank.bundle.sequences import Logits, Sequences
from qrank.quality.collection import Collection
from qrank.scoring.batching import CPU_BATCHES, cut_padded
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.system.machine import peak_memory, processors

COLUMNS = {
    "variant": "",
    "docs": "d",
    "p50 ms": ",.0f",
    "p95 ms": ",.0f",
    "pairs/s": ",.0f",
    "tokens/s": ",.0f",
    "padding": ".1%",
    "outside the backend": ".1%",
    "peak MB": ",.0f",
}


def main() -> None:
    """Run a process for every variant and number of documents, and print their results."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--queries", type=int, default=60, help="queries  [default: %(default)s]")
    parser.add_argument("--documents", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--words", type=int, help="of a document  [default: all]")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--child", nargs=3, metavar=("TASKS", "VARIANT", "N"), help="(internal)")
    options = parser.parse_args()
    if options.child:
        tasks, variant, count = options.child
        row = measure(options.model, variant, Path(tasks), int(count), options.threads)
        sys.stdout.write(json.dumps(row))
        return
    collection = Collection.read(options.data)
    rows = []
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as tasks:
        # The child's memory must not include that of the search for documents.
        found = collection.bm25(max(options.documents))
        names = list(collection.queries)[: options.queries]
        content = [
            [
                collection.queries[q],
                [" ".join(collection.documents[d].split()[: options.words]) for d in found[q]],
            ]
            for q in names
        ]
        json.dump(content, tasks)
        tasks.flush()
        command = [sys.executable, __file__, "--data", options.data, "--model", options.model]
        command += ["--threads", str(options.threads), "--child", tasks.name]
        for variant in locate(options.model).manifest.variants:
            for count in options.documents:
                child = subprocess.run(
                    [*command, variant, str(count)], stdout=subprocess.PIPE, check=True
                )
                rows.append(json.loads(child.stdout))
    length = f", {options.words} words a document" if options.words else ""
    title = (
        f"Reranking with {options.model}: {len(names)} queries{length}, {options.threads} threads"
    )
    report(title, COLUMNS, rows, as_json=options.json)


def measure(model: str, variant: str, tasks: Path, count: int, threads: int) -> dict[str, object]:
    """Rank every query's first `count` documents, after one request that warms up."""
    content = json.loads(tasks.read_text("utf-8"))
    reranker = Reranker(model, backend=variant, threads=threads)
    bundle = reranker.engine.bundle
    tokenizer = PairTokenizer(bundle.tokenizer, bundle.manifest.family, threads=threads)
    backend = reranker.engine._backend
    assert backend is not None
    inside: list[float] = []
    compute = backend.logits

    def timed(sequences: Sequences) -> Logits:
        start = time.perf_counter()
        found = compute(sequences)
        inside.append(time.perf_counter() - start)
        return found

    seconds: list[float] = []
    tokens = padded = 0
    with mock.patch.object(backend, "logits", timed):
        for number, (query, documents) in enumerate([content[0], *content]):
            start = time.perf_counter()
            reranker.rank(query, documents[:count])
            if number == 0:
                inside.clear()
                continue
            seconds.append(time.perf_counter() - start)
            lengths = encode(tokenizer, query, documents[:count]).lengths
            tokens += int(lengths.sum())
            batches = cut_padded(lengths, CPU_BATCHES[0])
            padded += sum(len(b) * int(lengths[b].max()) for b in batches)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    total = sum(seconds)
    return {
        "variant": variant,
        "docs": count,
        "p50 ms": p50,
        "p95 ms": p95,
        "pairs/s": count * len(seconds) / total,
        "tokens/s": tokens / total,
        "padding": 1 - tokens / padded,
        "outside the backend": 1 - sum(inside) / total,
        "peak MB": peak_memory() / 1e6,
    }


if __name__ == "__main__":
    main()
