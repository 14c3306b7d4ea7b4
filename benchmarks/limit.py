"""The machine's limit: the best matrix product of any library, and the peak of its instructions.

Products have the shape of a feed-forward layer: a batch of M tokens, K numbers each, times a matrix
of K x N. Each library multiplies with weights it has packed before, as in a model. The peak is that
of registers alone, by a loop in C with the widest instructions the CPU has; it needs a C compiler.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from common import alternate, arguments, report
from numpy.typing import ArrayLike
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, SessionOptions
from openvino import opset13 as ops

from qrank.system.machine import instruction_sets, processors

Product = Callable[[], object]
Shape = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = (
    (128, 384, 1536),
    (640, 384, 1536),
    (128, 768, 3072),
    (640, 768, 3072),
    (128, 1024, 4096),
    (640, 1024, 4096),
    (2560, 1024, 4096),
)
"""M, K and N: short and long batches of MiniLM's, BERT-base's and XLM-R-large's width."""

PRECISIONS = ("fp32", "bf16", "int8")
ROWS = 640
"""Tokens in the products that a model is compared with: more gain little."""

PATIENCE = 1.0
"""A product that takes more seconds is left out: the library has no kernel of its own for it."""

PEAKS = {
    "AMX int8": ("int8", "amx_int8"),
    "AMX bf16": ("bf16", "amx_bf16"),
    "VNNI": ("int8", "vnni"),
    "AVX-512 BF16": ("bf16", "avx512_bf16"),
    "AVX-512": ("fp32", "avx512"),
    "AVX2": ("fp32", "avx2"),
}
"""Instruction set -> the precision it computes in, and its loop in `peak.c`."""


def main() -> None:
    """Time every library on every shape, and print a table for each precision."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    tops = peaks(options.threads)
    for precision in PRECISIONS:
        rows = []
        for shape in SHAPES:
            found = rates(precision, shape, options.threads, options.rounds)
            best = max(found.values(), default=None)
            share = best / tops[precision] if best and precision in tops else None
            rows.append({"M x K x N": " x ".join(map(str, shape)), **found, "of peak": share})
        columns = {"M x K x N": "", **{name: ",.0f" for row in rows for name in _libraries(row)}}
        peak = f"{tops[precision] / 1e9:,.0f}" if precision in tops else "unknown"
        cells = [
            {key: x if key in ("M x K x N", "of peak") else x / 1e9 for key, x in row.items()}
            for row in rows
        ]
        title = f"{precision} products in GFLOP/s, {options.threads} threads; peak {peak}"
        report(title, {**columns, "of peak": ".0%"}, cells, as_json=options.json)


Best = dict[str, tuple[str, float]]
"""Precision -> the fastest library, and its operations per second."""


def best(width: int, inner: int, threads: int, rounds: int, earlier: Best | None = None) -> Best:
    """The fastest products at a model's size, or those found earlier if they were faster.

    A machine whose speed changes by the minute is measured before and after what is compared.
    """
    found = {}
    for precision in PRECISIONS:
        speeds = rates(precision, (ROWS, width, inner), threads, rounds)
        name = max(speeds, key=lambda name: speeds[name])
        now = (name, speeds[name])
        found[precision] = max(now, (earlier or {}).get(precision, now), key=lambda x: x[1])
    return found


def operations(config: Mapping[str, Any], lengths: ArrayLike) -> float:
    """Floating-point operations of an encoder's matrix products, without padding.

    Args:
        config: the checkpoint's config.json.
        lengths: tokens of each pair.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    tokens = np.asarray(lengths, np.float64)
    modern = config["model_type"] == "modernbert"  # gated, and with windows in most layers
    products = tokens * (4 * width**2 + (3 if modern else 2) * width * inner)
    seen = tokens
    if modern:
        every = config["global_attn_every_n_layers"]
        seen = tokens / every + np.minimum(tokens, config["local_attention"]) * (1 - 1 / every)
    layer = 2 * products + 4 * tokens * seen * width
    return float(config["num_hidden_layers"] * layer.sum())


def arithmetic(system: str) -> str:
    """The precision of a system's matrix products, and so of the limit it is compared with.

    Args:
        system: its name in a table: of a peer, or a variant with its compute dtype.
    """
    name = system.rpartition(":")[2]
    if "openvino" in name.lower() or "optimum-intel" in name or "bf16" in name:
        if "w8a8" in name:
            return "int8"
        # OpenVINO's default on CPUs that have it.
        has_bf16 = any("bf16" in x.lower() for x in instruction_sets())
        return "bf16" if has_bf16 and "fp32" not in name else "fp32"
    return "int8" if "int8" in name or "q8_0" in name or "q4_k" in name else "fp32"


def _libraries(row: Mapping[str, object]) -> Iterator[str]:
    yield from (name for name in row if name not in ("M x K x N", "of peak"))


def rates(precision: str, shape: Shape, threads: int, rounds: int) -> dict[str, float]:
    """Operations per second of each library that has a kernel for a product, by name.

    Those of the fastest round: a limit is what the machine reaches when nothing disturbs it.

    Args:
        precision: one of PRECISIONS.
        shape: M, K and N.
        threads: to compute with.
        rounds: in which the libraries take turns.
    """
    cases = dict(products(precision, shape, threads))
    work = 2 * np.prod(np.array(shape, np.int64))
    return {name: float(work / min(seconds)) for name, seconds in alternate(cases, rounds).items()}


def products(precision: str, shape: Shape, threads: int) -> Iterator[tuple[str, Product]]:
    """The libraries' products, ready to be called; those without a kernel are left out."""
    makers = {"torch": _torch, "onnxruntime": _onnxruntime, "OpenVINO": _openvino}
    for name, make in makers.items():
        if name == "onnxruntime" and precision == "bf16":
            continue  # it has no such kernel for the CPU
        product = make(precision, shape, threads)
        begun = time.perf_counter()
        product()
        if time.perf_counter() - begun > PATIENCE:
            sys.stderr.write(f"left out, no kernel for this CPU: {name}, {precision}\n")
            continue
        yield name, product


def _torch(precision: str, shape: Shape, threads: int) -> Product:
    torch.set_num_threads(threads)
    m, k, n = shape
    if precision == "int8":
        a, b = (torch.randint(-127, 127, size, dtype=torch.int8) for size in ((m, k), (k, n)))
        return partial(torch._int_mm, a, b)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = torch.nn.Linear(k, n, bias=False).to(dtype).requires_grad_(False)
    return partial(layer, torch.randn(m, k, dtype=dtype))


def _onnxruntime(precision: str, shape: Shape, threads: int) -> Product:
    """fp32, or unsigned by signed bytes, for which alone it has fast kernels."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    if precision == "int8":
        weights: Any = rng.integers(-127, 127, (k, n), np.int8)
        given: Any = rng.integers(0, 255, (m, k), np.uint8)
        node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
        kinds = (TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32)
    else:
        weights = rng.standard_normal((k, n), np.float32)
        given = rng.standard_normal((m, k), np.float32)
        node = helper.make_node("MatMul", ["a", "b"], ["c"])
        kinds = (TensorProto.FLOAT,) * 3
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", kinds[0], [m, k])],
        [helper.make_tensor_value_info("c", kinds[2], [m, n])],
        [helper.make_tensor("b", kinds[1], [k, n], weights.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    settings = SessionOptions()
    settings.intra_op_num_threads = threads
    session = InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return partial(session.run, None, {"a": given})


def _openvino(precision: str, shape: Shape, threads: int) -> Product:
    """Static shapes; int8 by fixed ranges on both sides, its fastest form."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    a = ops.parameter([m, k], np.float32)
    b: Any = rng.standard_normal((n, k), np.float32)
    if precision == "int8":
        left = ops.fake_quantize(a, -4.0, 127 / 128 * 4, -4.0, 127 / 128 * 4, 256)
        bytes_ = ops.constant(np.clip(b * 30, -127, 127).astype(np.int8))
        right = ops.multiply(ops.convert(bytes_, np.float32), np.full((n, 1), 0.03, np.float32))
    else:
        left, right = a, ops.constant(b)
    model = openvino.Model([ops.matmul(left, right, False, True)], [a])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    given = rng.standard_normal((m, k), np.float32)
    return partial(request.infer, [given], share_inputs=True, share_outputs=True)


def peaks(threads: int) -> dict[str, float]:
    """Operations per second of the widest instructions, by precision; {} without a compiler.

    The threads of one core share its units: with more threads than cores it is that of the cores.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.stderr.write("no C compiler here: the instructions' peak is left out\n")
        return {}
    source = Path(__file__).with_name("peak.c")
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        flags = ["-O2", "-shared", "-fPIC", "-o", str(path)]
        made = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True)
        if made.returncode:
            sys.stderr.write(f"{compiler} cannot compile {source.name}: {made.stderr[:300]}\n")
            return {}
        library = ctypes.CDLL(str(path))
        for name in instruction_sets():
            if name not in PEAKS:
                continue
            precision, loop = PEAKS[name]
            function = getattr(library, loop)
            function.restype = ctypes.c_double
            found[precision] = max(found.get(precision, 0.0), _peak(function, threads))
    return found


def _peak(function: Callable[[int], float], threads: int) -> float:
    """Operations per second of a loop on all threads; the best of five."""
    times = 20_000_000
    with ThreadPoolExecutor(threads) as pool:
        rounds = []
        for _ in range(5):
            begun = time.perf_counter()
            done = sum(pool.map(function, [times] * threads))
            rounds.append(done / (time.perf_counter() - begun))
    return max(rounds)


if __name__ == "__main__":
    main()
