"""ONNX graphs on onnxruntime: the CPU, and every execution provider it was built with."""

from __future__ import annotations

import base64
import ctypes
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends.contract import GRAPH_STEMS, BackendSpec, Format, Options, Precision
from qrank.bundle.fidelity import BFLOAT16, EIGHT_BITS, FLOAT16, FLOAT32, FOUR_BITS
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences, feed, no_prefix, read_prefix
from qrank.errors import TargetError
from qrank.scoring.batching import (
    CPU_BATCHES,
    DEVICE_BATCHES,
    cut,
    default_batch,
    in_halves,
    in_order,
    out_of_memory,
)
from qrank.scoring.memory import MemoryBudget
from qrank.system import machine
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}

_PRODUCT = base64.b64decode(
    "CAg6TwoRCgFhCgFiEgFjIgZNYXRNdWwSB3Byb2R1Y3RaDwoBYRIKCggIARIECgAKAFoPCgFiEgoKCAgBEgQKAAoAYg8K"
    "AWMSCgoICAESBAoACgBCBAoAEBE="
)
"""The ONNX graph c = MatMul(a, b) of fp32 matrices, opset 17."""


def version() -> str:
    """The runtime's name and version."""
    return f"onnxruntime {need('onnxruntime', extra='onnx').__version__}"


def devices() -> list[str]:
    """Devices this build of onnxruntime has a provider for."""
    present = need("onnxruntime", extra="onnx").get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in present]


def batches(device: str) -> tuple[int, ...]:
    """Padded tokens per batch that are worth trying, the default first."""
    return CPU_BATCHES if device == "cpu" else DEVICE_BATCHES


def memory(device: str) -> int | None:
    """Bytes of a device's own memory; None if unknown."""
    if device not in ("cuda", "tensorrt"):
        return None
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    # The first device visible to the process: CUDA_VISIBLE_DEVICES applies.
    first, size = ctypes.c_int(), ctypes.c_size_t()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(first), 0)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), first)
    )
    return None if failed else size.value


def product(a: Floats, b: Floats, device: str) -> Floats:
    """The matrix product, computed on a device."""
    session = need("onnxruntime", extra="onnx").InferenceSession(
        _PRODUCT, providers=[PROVIDERS[device]]
    )
    if session.get_providers()[0] != PROVIDERS[device]:
        raise TargetError(f"onnxruntime fell back to {session.get_providers()[0]}")
    return np.asarray(session.run(["c"], {"a": a, "b": b})[0])


def open(folder: Path, variant: Variant, device: str, options: Options) -> OnnxBackend:
    """Load a variant's `model.onnx`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        TargetError: the device is absent, or onnxruntime cannot load the graph on it.
    """
    ort = need("onnxruntime", extra="onnx")
    if device not in (present := devices()):
        raise TargetError(
            f"onnxruntime {ort.__version__} here has no device {device!r}; "
            f"present are: {', '.join(present)}"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # failures are raised; a smaller batch may then fit in memory
    # A batch runs on its stream's own thread and on the session's pool, which all streams share:
    # together they use exactly the allowed number of threads.
    pool = (options.threads + 1) // 2 if device == "cpu" else options.threads
    streams = options.threads + 1 - pool
    settings.intra_op_num_threads = pool
    # Threads that spin for work would take CPU time from each other.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not machine.has_vnni():
        # x86 CPUs without VNNI saturate unsigned x signed int8 products; this widens them. It also
        # avoids the fast products of CPUs that have VNNI or AMX: half the speed, equal results.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    # The arena keeps the peak memory of every length it ever saw, and brings no gain here.
    settings.enable_cpu_mem_arena = False
    provider = PROVIDERS[device]
    if device != "cpu":
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = folder / variant.folder / "model.onnx"
    try:
        # By default, it falls back to the CPU if a device fails.
        session = ort.InferenceSession(str(path), settings, providers=[provider], enable_fallback=0)
    except Exception as error:  # onnxruntime's own exceptions share no base
        raise TargetError(f"onnxruntime cannot load {path} on {device}: {error}") from error
    if session.get_providers()[0] != provider:
        raise TargetError(
            f"onnxruntime fell back from {provider} to {session.get_providers()[0]}: "
            f"the libraries of {device} are missing or do not match"
        )
    if device != "cpu":
        _require_most(session, device)
    decoder = any(i.name == "prefix" for i in session.get_inputs())
    batch = options.max_batch_tokens or default_batch(device, decoder)
    return OnnxBackend(session, batch=batch, streams=streams, memory=options.memory)


def _require_most(session: onnxruntime.InferenceSession, device: str) -> None:
    """Refuse a graph if a device leaves most matrix products, nearly all of the work, to the CPU.

    The CPU computes those silently. Older versions of onnxruntime do not report the assignment:
    with them, every graph is accepted.
    """
    tell = getattr(session, "get_provider_graph_assignment_info", list)
    products: Counter[str] = Counter()
    for part in tell():
        names = (node.op_type for node in part.get_nodes())
        products[part.ep_name] += sum("MatMul" in name or "Gemm" in name for name in names)
    if 2 * (here := products[PROVIDERS[device]]) < products.total():
        raise TargetError(
            f"onnxruntime computes only {here} of this graph's {products.total()} matrix products "
            f"on {device}, and the others on the CPU: name another variant, or device cpu"
        )


class OnnxBackend:
    """A session fed by parallel streams: of small batches on the CPU, of large ones elsewhere."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        batch: int,
        streams: int,
        memory: MemoryBudget,
    ) -> None:
        self._session = session
        self._memory = memory
        shapes = {i.name: i.shape for i in session.get_inputs()}
        self._names = list(shapes)
        # Empty if the graph has no `prefix` input.
        self._bare = no_prefix(shapes["prefix"]) if "prefix" in shapes else {}
        self._batch = batch
        self._parallel = streams
        self._streams = ThreadPoolExecutor(streams, "qrank-onnx")

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        if not self._bare:
            sequences = sequences.whole()
        batches = cut(sequences, self._batch, self._memory, self._parallel)
        prefix = read_prefix(sequences.prefix, self._bare, partial(self._call, "present"))
        if len(batches) == 1:
            results = [self._run(sequences.take(batches[0]), prefix)]
        else:
            results = list(
                self._streams.map(lambda b: self._run(sequences.take(b), prefix), batches)
            )
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._streams.shutdown()
        del self._session

    def _run(self, batch: Sequences, prefix: dict[str, NDArray[Any]]) -> Logits:
        with self._memory.reserve(len(batch), int(batch.lengths.max()), len(batch.prefix)):
            logits = self._call("logits", batch, prefix)
        return np.asarray(logits, np.float32).reshape(len(batch))

    def _call(self, output: str, batch: Sequences, more: dict[str, NDArray[Any]]) -> NDArray[Any]:
        found: NDArray[Any] = in_halves(batch, lambda some: self._compute(output, some, more))
        return found

    def _compute(
        self, output: str, batch: Sequences, more: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        inputs = feed(self._names, batch, more=more)
        try:
            (found,) = self._session.run([output], inputs)
        except Exception as error:  # onnxruntime's own exceptions share no base
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise TargetError(f"onnxruntime failed: {error}") from error
        return np.asarray(found)


def _conflict() -> str:
    """What is wrong if several onnxruntime builds are installed: they overwrite each other."""
    builds = machine.packages(("onnxruntime",))
    if len(builds) < 2:
        return ""
    return f"{' and '.join(builds)} overwrite each other: uninstall all, install one"


SPEC = BackendSpec(
    runtime="onnxruntime",
    open=open,
    version=version,
    devices=devices,
    kinds=tuple(PROVIDERS),
    modules=("onnxruntime",),
    extra="onnx",
    format=Format(
        precisions=(
            Precision("int8", EIGHT_BITS, cpu=2, elsewhere=2, stem=GRAPH_STEMS["int8"]),
            Precision("fp16", FLOAT16, bytes=2, cpu=8, elsewhere=1, stem=GRAPH_STEMS["fp16"]),
            Precision("fp32", FLOAT32, bytes=4, cpu=6, elsewhere=3, stem=GRAPH_STEMS["fp32"]),
            Precision("int4", FOUR_BITS, bytes=0.6, cpu=7, elsewhere=9, stem=GRAPH_STEMS["int4"]),
            Precision("bf16", BFLOAT16, made=False, elsewhere=8),
        ),
        converter="qrank.converters.onnx.export",
        importer="qrank.converters.onnx.prebuilt",
        suffix=".onnx",
        weights="{name}*",
    ),
    batches=batches,
    memory=memory,
    product=product,
    # Its CPU kernels check which instructions the CPU supports.
    in_process=lambda device: device == "cpu",
    conflict=_conflict,
)
