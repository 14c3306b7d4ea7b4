"""qrank compared with its alternatives: the same checkpoint, the same pairs, all in turns.

Each system turns text into scores, for BM25's best documents of one query after the other, in its
own process (`peer.py`) and with the same number of threads. The table shows its speed, the nDCG@10
of its scores, and its share of the machine's own limit: the best matrix products that any library
reaches (`limit.py`), of the model's own size, in the precision that the system computes in.

A peer is left out if no Python that has it is named. Their versions conflict: two environments hold
all of them (benchmarks/README.md).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import limit
import numpy as np
from common import alternate, arguments, report
from peer import OURS, PEERS, TOKENS

from qrank import Reranker
from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.quality.collection import Collection
from qrank.quality.metrics import MAIN, measure
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.system.machine import processors

DEFAULT = "sentence-transformers, fp32"
ONNX_PEERS = (
    "sentence-transformers, ONNX",
    "sentence-transformers, ONNX int8",
    "fastembed",
    "FlashRank, int8",
)
"""Peers that need the environment of optimum-onnx; llama.cpp runs in this one."""

COLUMNS = {
    "system": "",
    "pairs/s": ",.1f",
    "vs default": ".2f",
    "vs fastest peer": ".2f",
    MAIN: ".3f",
    "of best": ".0%",
}
LIMITS = {"matrix products in": "", "best": "", "GFLOP/s": ",.0f", "of peak": ".0%"}

Ask = Callable[[str, list[str]], dict[str, Any]]


def main() -> None:
    """Open every system, judge its scores, and time all in turns."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("checkpoint", type=Path, help="folder of the original")
    parser.add_argument("bundle", type=Path, help="what qrank converted it to, and tuned")
    parser.add_argument("--onnx-python", type=Path, help=f"that has {', '.join(ONNX_PEERS)}")
    parser.add_argument("--openvino-python", type=Path, help="that has the other peers")
    parser.add_argument("--variants", nargs="*", help="beside the chosen one  [default: all]")
    parser.add_argument("--only", nargs="+", help="systems, by the beginnings of their names")
    parser.add_argument("--queries", type=int, default=16, help="judged  [default: %(default)s]")
    parser.add_argument("--timed", type=int, default=1, help="of these  [default: %(default)s]")
    parser.add_argument("--documents", type=int, default=100, help="[default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[default: %(default)s]")
    parser.add_argument("--threads", type=int, default=processors())
    options = parser.parse_args()
    collection = Collection.read(options.data)
    found = collection.bm25(options.documents)
    queries = list(collection.qrels)[: options.queries]
    tasks = {
        query: (collection.queries[query], [collection.documents[d] for d in found[query]])
        for query in queries
    }
    qrels = {query: collection.qrels[query] for query in queries}
    with Reranker(options.bundle, threads=options.threads) as reranker:
        chosen = f"{OURS}, chosen: {reranker.target.name}"
        compute_dtype = reranker.choice.options.compute_dtype
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        systems: dict[str, Ask] = {}
        for label, system, python, model in _systems(options, chosen):
            command = [str(python), str(Path(__file__).with_name("peer.py")), system, str(model)]
            process = opened([*command, work, str(options.threads)], options.threads)
            systems[label] = stack.enter_context(process)
        ndcg = {}
        for label, ask in systems.items():
            order = {}
            for query, (text, documents) in tasks.items():
                scores = np.array(ask(text, documents)["scores"])
                ids = list(found[query])
                order[query] = [ids[i] for i in np.argsort(-scores, kind="stable")]
            ndcg[label] = float(measure(qrels, order, [MAIN])[MAIN].mean())
        timed = list(tasks.values())[: options.timed]
        cases: dict[str, Callable[[], object]] = {
            label: partial(_through, ask, timed) for label, ask in systems.items()
        }
        config = json.loads((options.checkpoint / "config.json").read_text("utf-8"))
        size = (config["hidden_size"], config["intermediate_size"])
        best = limit.best(*size, options.threads, options.rounds)
        seconds = alternate(cases, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = limit.best(*size, options.threads, options.rounds, best)
    peaks = limit.peaks(options.threads)
    pairs = sum(len(documents) for _, documents in timed)
    operations = limit.operations(config, _lengths(options, timed))
    peers = [name for name in systems if not name.startswith(OURS)]
    fastest = min((median[name] for name in peers), default=None)
    default = median.get(DEFAULT)
    rows = [
        {
            "system": name,
            "pairs/s": pairs / median[name],
            "vs default": default and default / median[name],
            "vs fastest peer": fastest and fastest / median[name],
            MAIN: ndcg[name],
            "of best": operations / median[name] / best[limit.arithmetic(name)][1],
        }
        for name in systems
    ]
    title = (
        f"{options.checkpoint.name}: {pairs} pairs of {options.data.name} timed, "
        f"{len(queries)} queries judged, {options.threads} threads"
    )
    report(title, COLUMNS, rows, as_json=options.json)
    table = [
        {
            "matrix products in": precision,
            "best": name,
            "GFLOP/s": found / 1e9,
            "of peak": found / peaks[precision] if precision in peaks else None,
        }
        for precision, (name, found) in best.items()
    ]
    report(f"The machine's limit ({limit.ROWS} tokens)", LIMITS, table, as_json=options.json)
    if compute_dtype and not options.json:
        sys.stdout.write(f"The chosen target computes in {compute_dtype}.\n")


def _systems(options: Any, chosen: str) -> Iterator[tuple[str, str, Path, Path]]:
    """Label, name in `peer.py`, the Python that runs it, and its model."""
    mine = Path(sys.executable)
    for name in PEERS:
        if options.only and not name.startswith(tuple(options.only)):
            continue
        python = options.onnx_python if name in ONNX_PEERS else options.openvino_python
        if name.startswith("llama.cpp"):
            yield name, name, mine, options.bundle
        elif python is not None:
            yield name, name, python, options.checkpoint
        else:
            sys.stderr.write(f"left out, no Python named that has it: {name}\n")
    yield chosen, OURS, mine, options.bundle
    named = options.variants
    for variant in Manifest.load(options.bundle).variants if named is None else named:
        yield f"{OURS} {variant}", f"{OURS} {variant}", mine, options.bundle


@contextmanager
def opened(command: list[str], threads: int, tokens: int = TOKENS) -> Iterator[Ask]:
    """Run a system in a process that ends with the context.

    Args:
        command: `peer.py` with its arguments.
        threads: threads to compute with.
        tokens: maximum tokens of a pair in sentence-transformers.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "QRANK_PEER_TOKENS": str(tokens),
        },
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(query: str, documents: list[str]) -> dict[str, Any]:
        process.stdin.write(json.dumps({"query": query, "documents": documents}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{command[2]} ended: run it by hand: {' '.join(command)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(30)


def _through(ask: Ask, tasks: list[tuple[str, list[str]]]) -> None:
    for query, documents in tasks:
        ask(query, documents)


def _lengths(options: Any, tasks: list[tuple[str, list[str]]]) -> list[int]:
    """Tokens of each pair of the tasks."""
    tokenizer = PairTokenizer(options.bundle / TOKENIZER, Manifest.load(options.bundle).family)
    return [len(tokenizer.whole(query, d)[0]) for query, documents in tasks for d in documents]


if __name__ == "__main__":
    main()
