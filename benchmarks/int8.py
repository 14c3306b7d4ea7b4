"""qrank's int8 for ONNX against onnxruntime's own methods, from one fp32 graph, in turns.

Rows: fp32; qrank's int8 (converters/onnx/quantize.py); `quantize_dynamic` with one scale per weight
column, except for causal models, whose fp32 graph may be too large for it; `MatMulNBits` with 8 and
4 bits in blocks of 32, with int8 activations. All leave the score head in fp32 and run in qrank's
backend. "max Δ" is the largest absolute difference of a logit from fp32. "batch" is the largest
difference between a pair's logit alone and in a padded batch of 16 pairs of mixed lengths.
"""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from common import alternate, arguments, encode, join, open_onnx, report, tolerate_anything
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from qrank.backends.onnx import OnnxBackend
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import TOKENIZER
from qrank.bundle.sequences import Logits, Sequences
from qrank.converters.convert import convert
from qrank.converters.onnx.export import head_nodes
from qrank.quality.collection import Collection
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.system.machine import processors

COLUMNS = {
    "graph": "",
    "MB": ",.1f",
    "pairs/s": ",.1f",
    "vs fp32": ".2f",
    "max Δ": ".4f",
    "of spread": ".1%",
    "tau": ".4f",
    "batch": ".5f",
}
BATCH = 16


def main() -> None:
    """Convert a checkpoint with every method, then run all graphs on the same pairs."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument("--family", help="of the checkpoint, where nothing in it says so")
    parser.add_argument("--queries", type=int, default=16, help="[default: %(default)s]")
    parser.add_argument("--documents", type=int, default=20, help="a query  [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[default: %(default)s]")
    parser.add_argument("--threads", type=int, default=processors())
    options = parser.parse_args()
    collection = Collection.read(options.data)
    found = collection.bm25(options.documents)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        variants = [("onnx", "fp32"), ("onnx", "int8")]
        # Random weights of many layers might be refused; this only measures them.
        tolerate_anything()
        made = convert(options.checkpoint, variants, folder, family=options.family)
        manifest = made.manifest
        tokenizer = PairTokenizer(folder / TOKENIZER, manifest.family, threads=options.threads)
        names = {"fp32": "fp32", "int8": "qrank int8"}
        if not manifest.family.decoder:
            _dynamic(folder)
            names["dynamic"] = "quantize_dynamic"
        for bits in (8, 4):
            _blocks(folder, bits)
            names[f"blocks{bits}"] = f"MatMulNBits, {bits} bits"
        work = join(
            [
                encode(
                    tokenizer, collection.queries[q], [collection.documents[d] for d in found[q]]
                )
                for q in list(collection.queries)[: options.queries]
            ]
        )
        opened = {name: open_onnx(folder, name, threads=options.threads) for name in names}
        seconds = alternate(
            {name: partial(backend.logits, work) for name, backend in opened.items()},
            options.rounds,
        )
        reference = opened["fp32"].logits(work)
        rows = []
        for name, backend in opened.items():
            fidelity = Fidelity.of(backend.logits(work), reference)
            ratios = np.array(seconds["fp32"]) / np.array(seconds[name])
            rows.append(
                {
                    "graph": names[name],
                    "MB": sum(f.stat().st_size for f in (folder / f"onnx-{name}").iterdir()) / 1e6,
                    "pairs/s": len(work) / median(seconds[name]),
                    "vs fp32": float(np.median(ratios)),
                    "max Δ": fidelity.max_abs,
                    "of spread": fidelity.max_abs / fidelity.spread,
                    "tau": fidelity.kendall,
                    "batch": _batch_dependence(backend, work),
                }
            )
    title = f"int8 of {options.checkpoint}: {len(work)} pairs, {options.threads} threads"
    report(title, COLUMNS, rows, as_json=options.json)


def _dynamic(folder: Path) -> None:
    graph, head = _fp32(folder)
    path = _new(folder, "dynamic")
    # It recommends preprocessing, which changes neither speed nor results here.
    logging.disable(logging.WARNING)
    quantize_dynamic(
        graph,
        path,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=head,
    )
    logging.disable(logging.NOTSET)


def _blocks(folder: Path, bits: int) -> None:
    graph, head = _fp32(folder)
    config = DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=True, accuracy_level=4, bits=bits
    )
    quantizer = MatMulNBitsQuantizer(graph, bits=bits, algo_config=config, nodes_to_exclude=head)
    logging.disable(logging.WARNING)
    quantizer.process()
    logging.disable(logging.NOTSET)
    quantizer.model.save_model_to_file(str(_new(folder, f"blocks{bits}")), True)


def _fp32(folder: Path) -> tuple[onnx.ModelProto, list[str]]:
    graph = onnx.load(folder / "onnx-fp32" / "model.onnx")
    # The exporter's shapes conflict with the quantizers' shape inference.
    del graph.graph.value_info[:]
    return graph, sorted(head_nodes(graph))


def _new(folder: Path, name: str) -> Path:
    path = folder / f"onnx-{name}" / "model.onnx"
    path.parent.mkdir()
    return path


def _batch_dependence(backend: OnnxBackend, work: Sequences) -> float:
    order = np.random.default_rng(0).permutation(len(work))
    alone: list[Logits] = []
    batched: list[Logits] = []
    for start in range(0, len(work), BATCH):
        batch = work.take(order[start : start + BATCH])
        backend._batch = 1
        alone.append(backend.logits(batch))
        backend._batch = 2**30
        batched.append(backend.logits(batch))
    return float(np.abs(np.concatenate(alone) - np.concatenate(batched)).max())


if __name__ == "__main__":
    main()
