"""What `qrank export` writes, loaded by the programs it is for: how far their scores are from ours.

Every variant of a bundle is exported to a folder of its own and loaded by the programs of its
format, each in its own process (`peer.py`, `exported.mjs`). They score the same pairs as qrank: odd
texts in many scripts, and documents beyond the model's limit. A program is left out if no Python
(or folder with transformers.js) that has it is named.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, report
from peer import LOADERS
from vs_peers import opened

from qrank import Reranker
from qrank.bundle.locate import locate
from qrank.converters.export import export
from qrank.scoring.pair_tokenizer import PairTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from odd_texts import odd_texts

JAVASCRIPT = "exported: transformers.js"
QUERY = "Which 惑星 is known as the “red planet”, naïvely?"
COLUMNS = {
    "variant": "",
    "program": "",
    "pairs": ",d",
    "largest difference": ".1e",
    "of scores": "",
}


def main() -> None:
    """Export every variant, and compare the scores of every program that loads it."""
    parser = arguments(__doc__)
    parser.add_argument("bundle", help="a bundled name or a folder")
    parser.add_argument("--onnx-python", type=Path, help="with fastembed and optimum-onnx")
    parser.add_argument("--openvino-python", type=Path, help="with optimum-intel")
    parser.add_argument("--javascript", type=Path, help="folder with transformers.js installed")
    parser.add_argument("--texts", type=int, default=200, help="[default: %(default)s]")
    options = parser.parse_args()
    bundle = locate(options.bundle)
    documents = odd_texts(options.texts)
    tokenizer = PairTokenizer(bundle.tokenizer, bundle.manifest.family)
    room = tokenizer.prompt(QUERY).capacity
    plain = [d for d in documents if d and max(d) <= "\uffff"]
    plain = [d for d in plain if len(tokenizer.ids([d])[0]) <= room]
    rows: list[dict[str, Any]] = []
    for variant in bundle.manifest.variants.values():
        if variant.format not in ("onnx", "openvino"):
            continue
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "exported"
            export(bundle, folder, [variant.name])
            dtype = "fp32" if variant.format == "openvino" else None
            with Reranker(bundle, backend=variant.name, compute_dtype=dtype) as reranker:
                for name, command in _programs(options, variant.format, folder, work):
                    # transformers.js reads others in its own way (docs/export.md).
                    texts = plain if name == JAVASCRIPT else documents
                    raw = "sentence-transformers" not in name
                    ours = reranker.score([(QUERY, text) for text in texts], raw=raw)
                    with opened(command, 1) as ask:
                        theirs = np.array(ask(QUERY, texts)["scores"])
                    rows.append(
                        {
                            "variant": variant.name,
                            "program": name.removeprefix("exported: "),
                            "pairs": len(texts),
                            "largest difference": float(np.abs(ours - theirs).max()),
                            "of scores": "logits" if raw else "after the activation",
                        }
                    )
    report(f"{bundle.manifest.name}, exported", COLUMNS, rows, as_json=options.json)


def _programs(
    options: Any, format: str, folder: Path, work: str
) -> Iterator[tuple[str, list[str]]]:
    """Name of a program that loads a format, and the command that runs it."""
    script = str(Path(__file__).with_name("peer.py"))
    for name in LOADERS:
        openvino = name.endswith("OpenVINO")
        python = options.openvino_python if openvino else options.onnx_python
        if openvino == (format == "openvino") and python is not None:
            yield name, [str(python), script, name, str(folder), work, "1"]
    if format == "onnx" and options.javascript is not None:
        # Node looks for packages beside the script.
        program = options.javascript / "exported.mjs"
        program.write_bytes(Path(__file__).with_name("exported.mjs").read_bytes())
        yield JAVASCRIPT, ["node", str(program), str(folder)]


if __name__ == "__main__":
    main()
