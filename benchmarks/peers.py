"""qrank beside sentence-transformers, on documents of uneven length and the same checkpoint.

Both get the same pairs of Cranfield queries and BM25 candidates (52 to 512 tokens) as text and
return scores. sentence-transformers runs in torch (fp32, its default) and, where optimum-intel is
installed, with its OpenVINO backend, which exports the checkpoint as it is loaded. All take turns.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common import alternate, arguments, report
from scipy.stats import kendalltau
from sentence_transformers import CrossEncoder

from qrank import Reranker
from qrank.bundle import Manifest
from qrank.collection import Collection
from qrank.machine import processors

Pairs = list[tuple[str, str]]
COLUMNS = {"target": "", "pairs/s": ",.1f", "vs default": ".2f", "vs OpenVINO": ".2f", "tau": ".3f"}
DEFAULT, OPENVINO = "sentence-transformers", "sentence-transformers, OpenVINO"


def main() -> None:
    """Time every target, and hold its order against sentence-transformers' own."""
    parser = arguments(__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of the original")
    parser.add_argument("bundle", type=Path, help="what qrank converted it to")
    parser.add_argument("--targets", nargs="+", help="variants  [default: all of the bundle]")
    parser.add_argument("--queries", type=int, default=4, help="each with 20 documents")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data FOLDER is needed")
    torch.set_num_threads(processors())
    collection = Collection.read(options.data)
    pairs = [
        (collection.queries[query], collection.documents[document])
        for query, found in list(collection.bm25(20).items())[: options.queries]
        for document in found
    ]
    systems: dict[str, Callable[[Pairs], object]] = {}
    load = partial(CrossEncoder, str(options.checkpoint), device="cpu", local_files_only=True)
    theirs = {DEFAULT: load(model_kwargs={"dtype": torch.float32})}
    if find_spec("optimum") and find_spec("optimum.intel"):
        theirs[OPENVINO] = load(backend="openvino")
    for name, model in theirs.items():
        systems[name] = partial(model.predict, show_progress_bar=False)
    for name in options.targets or Manifest.load(options.bundle).variants:
        systems[name] = Reranker(options.bundle, backend=name).score
    reference = np.asarray(systems[DEFAULT](pairs))
    tau = {
        name: kendalltau(reference, np.asarray(score(pairs))).statistic
        for name, score in systems.items()
    }
    seconds = alternate({n: partial(score, pairs) for n, score in systems.items()}, options.rounds)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [
        {
            "target": name,
            "pairs/s": len(pairs) / median[name],
            "vs default": median[DEFAULT] / median[name],
            "vs OpenVINO": median[OPENVINO] / median[name] if OPENVINO in median else None,
            "tau": tau[name],
        }
        for name in systems
    ]
    title = f"{options.checkpoint.name}: {len(pairs)} pairs of {options.data.name}"
    report(title, COLUMNS, rows, as_json=options.json)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main()
