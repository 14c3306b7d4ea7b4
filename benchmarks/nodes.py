"""Where a graph's time goes, by kind of node: what a profile of one batch on one thread shows.

For onnxruntime its own profile, for OpenVINO its performance counters. Fused nodes have the names
of the runtime's kernels. The graph runs as qrank runs it, in one stream: 16-bit causal models in
OpenVINO on two threads.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
from common import arguments, report

from qrank.backends import openvino as openvino_backend
from qrank.backends.contract import Options
from qrank.backends.openvino_nodes import may_fuse_mlp
from qrank.bundle.locate import DEFAULT, locate
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Sequences, feed, no_prefix, read_prefix
from qrank.system.machine import has_vnni

COLUMNS = {"node": "", "ms": ".1f", "share": ".1%", "count": ",d"}
SMALL = 0.01
"""Kinds of nodes below this share are one row."""

Inputs = dict[str, Any]


def main() -> None:
    """Profile each variant, and print a table of each."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--variants", nargs="+", help="[default: all of ONNX and OpenVINO]")
    parser.add_argument("--tokens", type=int, default=220, help="of a document, or of a pair")
    parser.add_argument("--documents", type=int, default=1, help="in the batch")
    parser.add_argument("--prefix", type=int, default=64, help="shared tokens, for causal models")
    parser.add_argument("--compute-dtype", default="fp32", help="of OpenVINO")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bundle = locate(options.model)
    made = bundle.manifest.variants
    for name in options.variants or made:
        if made[name].format not in ("onnx", "openvino"):
            sys.stderr.write(f"{name} has no profile\n")
            continue
        bundle.provide(made[name])
        work = _work(bundle, options)
        profile = _onnx if made[name].format == "onnx" else _openvino
        whole, found = profile(bundle, name, work, options)
        title = f"{name}: {options.documents} x {options.tokens} tokens, {whole:.1f} ms"
        report(title, COLUMNS, list(_rows(whole, found)), as_json=options.json)


def _rows(whole: float, found: Mapping[str, list[float]]) -> Iterator[dict[str, object]]:
    sums = {kind: sum(times) for kind, times in found.items()}
    small = [kind for kind in sums if sums[kind] < SMALL * whole]
    for kind in sorted(set(sums) - set(small), key=lambda kind: -sums[kind]):
        yield {
            "node": kind,
            "ms": sums[kind],
            "share": sums[kind] / whole,
            "count": len(found[kind]),
        }
    rest = sum(sums[kind] for kind in small)
    yield {
        "node": f"{len(small)} other kinds",
        "ms": rest,
        "share": rest / whole,
        "count": sum(len(found[kind]) for kind in small),
    }
    outside = whole - sum(sums.values())
    yield {"node": "outside of nodes", "ms": outside, "share": outside / whole}


def _work(bundle: Bundle, options: Any) -> Sequences:
    """Random ordinary tokens."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return rng.integers(100, 1000, count).astype(np.int32)

    family = bundle.manifest.family
    sequences = [ids(options.tokens) for _ in range(options.documents)]
    prefix = ids(options.prefix if family.decoder else 0)
    segments = None
    if family.segments is not None:
        segments = [(np.arange(options.tokens) > 10).astype(np.int8)] * options.documents
    return Sequences(sequences, segments, prefix)


def _onnx(
    bundle: Bundle, name: str, work: Sequences, options: Any
) -> tuple[float, dict[str, list[float]]]:
    """Milliseconds of a run, and those of its nodes by kind."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.enable_profiling = True
    settings.enable_cpu_mem_arena = False
    if not has_vnni():
        settings.add_session_config_entry("session.x64quantprecision", "1")
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        path = bundle.folder / bundle.manifest.variants[name].folder / "model.onnx"
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        inputs = _inputs(
            {i.name: i.shape for i in session.get_inputs()},
            work,
            lambda given: session.run(["present"], given)[0],
        )
        times = []
        for _ in range(options.rounds + 1):
            begun = time.perf_counter()
            session.run(["logits"], inputs)
            times.append((time.perf_counter() - begun) * 1e3)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    runs: list[dict[str, list[float]]] = [defaultdict(list)]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1][event["args"]["op_name"]].append(event["dur"] / 1e3)
        elif event.get("name") == "model_run":
            runs.append(defaultdict(list))
    # The last is after the last run.
    return _middle(times, runs[:-1], options.rounds)


def _openvino(
    bundle: Bundle, name: str, work: Sequences, options: Any
) -> tuple[float, dict[str, list[float]]]:
    """Milliseconds of a run, and those of its nodes by kind."""
    variant = bundle.manifest.variants[name]
    core = openvino.Core()
    model = core.read_model(bundle.folder / variant.folder / "model.xml")
    decoder = bundle.manifest.family.decoder
    # A fused feed-forward block crashes on one thread.
    threads = 2 if decoder and may_fuse_mlp(model) else 1
    settings = openvino_backend._settings("cpu", variant, Options(threads, options.compute_dtype))
    settings["NUM_STREAMS"] = 1
    group = openvino_backend.DECODER_GROUP if decoder else openvino_backend.GROUP
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    compiled = core.compile_model(model, "CPU", settings | {"PERF_COUNT": True})
    request = compiled.create_infer_request()
    shapes = {
        i.any_name: [0 if d.is_dynamic else d.get_length() for d in i.partial_shape]
        for i in compiled.inputs
    }
    inputs = _inputs(shapes, work, lambda given: np.array(request.infer(given)["present"]))
    times, runs = [], []
    for _ in range(options.rounds + 1):
        begun = time.perf_counter()
        request.infer(inputs)
        times.append((time.perf_counter() - begun) * 1e3)
        found: dict[str, list[float]] = defaultdict(list)
        for node in request.profiling_info:
            if milliseconds := node.real_time.total_seconds() * 1e3:
                found[f"{node.node_type} {node.exec_type}"].append(milliseconds)
        runs.append(found)
    return _middle(times, runs, options.rounds)


def _inputs(shapes: Mapping[str, Any], work: Sequences, present: Any) -> Inputs:
    """A graph's inputs; for a causal model with the prefix's keys and values."""
    more: Inputs = {}
    if "prefix" in shapes:
        names = list(shapes)
        more = read_prefix(
            work.prefix,
            no_prefix(shapes["prefix"]),
            lambda prefix, bare: present(feed(names, prefix, more=bare)),
        )
    return feed(list(shapes), work, more=more)


def _middle(
    times: list[float], runs: list[dict[str, list[float]]], rounds: int
) -> tuple[float, dict[str, list[float]]]:
    """The run that took the median time, of the last `rounds`, and its nodes."""
    last = sorted(zip(times[-rounds:], runs[-rounds:], strict=True), key=lambda run: run[0])
    return last[len(last) // 2]


if __name__ == "__main__":
    main()
