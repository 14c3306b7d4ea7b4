"""ONNX graphs on onnxruntime: the CPU, and every execution provider it was built with."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.backends import keys, nvidia
from qrank.backends.contract import (
    GRAPH_STEMS,
    BackendSpec,
    Format,
    Options,
    Precision,
    kind,
    number,
)
from qrank.backends.onnx_graph import OnnxBackend, Shape
from qrank.bundle.fidelity import BFLOAT16, EIGHT_BITS, FLOAT16, FLOAT32, FOUR_BITS
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Floats
from qrank.errors import TargetError
from qrank.scoring.batching import CPU_BATCHES, DEVICE_BATCHES, default_batch
from qrank.system import cache, machine
from qrank.system.extras import find, need, pip_line

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
    """Devices this build of onnxruntime has a provider for.

    NVIDIA's cards are listed as far as their driver finds them: `cuda`, `cuda:1`, ...
    """
    present = need("onnxruntime", extra="onnx").get_available_providers()
    found = [device for device, provider in PROVIDERS.items() if provider in present]
    if not set(found).intersection(nvidia.KINDS):
        return found
    cards = nvidia.count()
    return [
        name
        for device in found
        for name in (_numbered(device, cards) if device in nvidia.KINDS else [device])
    ]


def _numbered(device: str, cards: int) -> list[str]:
    return [f"{device}:{card}" if card else device for card in range(cards)]


def batches(device: str) -> tuple[int, ...]:
    """Padded tokens per batch that are worth trying, the default first."""
    return CPU_BATCHES if device == "cpu" else DEVICE_BATCHES


def memory(device: str) -> int | None:
    """Bytes of a device's own memory; None if unknown."""
    if kind(device) not in nvidia.KINDS or device not in devices():
        return None
    return nvidia.memory(device)


def product(a: Floats, b: Floats, device: str) -> Floats:
    """The matrix product, computed on a device."""
    session = _session(_PRODUCT, device, need("onnxruntime", extra="onnx").SessionOptions())
    return np.asarray(session.run(["c"], {"a": a, "b": b})[0])


def open(folder: Path, variant: Variant, device: str, options: Options) -> OnnxBackend:
    """Load a variant's `model.onnx`.

    Args:
        folder: the bundle.
        variant: its folder holds the graph.
        device: one of `devices()`.
        options: TensorRT always gets static shapes.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        TargetError: the device is absent, or onnxruntime cannot load the graph on it.
    """
    ort = need("onnxruntime", extra="onnx")
    if device != "cpu" and device not in (present := devices()):
        raise TargetError(
            f"onnxruntime {ort.__version__} here has no device {device!r}; "
            f"present are: {', '.join(present)}{_advice(device)}"
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
    if machine.x86() and not machine.has_vnni():
        # x86 CPUs without VNNI saturate unsigned x signed int8 products; this widens them. It also
        # avoids the fast products of CPUs that have VNNI or AMX: half the speed, equal results.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    # The arena keeps the peak memory of every length it ever saw, and brings no gain here.
    settings.enable_cpu_mem_arena = False
    if device != "cpu":
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = folder / variant.folder / "model.onnx"
    if kind(device) == "tensorrt":
        return OnnxBackend(
            _engines(path, variant, device, settings),
            batch=options.max_batch_tokens or DEVICE_BATCHES[0],
            streams=streams,
            memory=options.memory,
            limit=Manifest.load(folder).family.max_length,
        )
    session = _session(path, device, settings)
    if device != "cpu":
        _require_most(session, device, variant)
    decoder = any(i.name == "prefix" for i in session.get_inputs())
    return OnnxBackend(
        lambda shape: session,
        batch=options.max_batch_tokens or default_batch(device, decoder),
        streams=streams,
        memory=options.memory,
        limit=Manifest.load(folder).family.max_length if options.static_shapes else None,
        holder=("cuda", number(device)) if decoder and kind(device) == "cuda" else None,
    )


def _session(
    graph: Path | bytes, device: str, settings: Any, **more: Any
) -> onnxruntime.InferenceSession:
    """A session on a device alone.

    Args:
        graph: the file, or its content.
        device: of `devices()`.
        settings: onnxruntime's.
        more: for TensorRT, see `nvidia.providers`.

    Raises:
        TargetError: onnxruntime cannot load the graph there.
    """
    ort, provider, missing = need("onnxruntime", extra="onnx"), PROVIDERS[kind(device)], ""
    providers: list[Any] = [provider]
    if kind(device) in nvidia.KINDS:
        missing = nvidia.load_libraries(ort, device)
        providers = nvidia.providers(PROVIDERS, device, **more)
    what = graph if isinstance(graph, bytes) else str(graph)
    try:
        # By default, it falls back to the CPU if a device fails.
        session = ort.InferenceSession(what, settings, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exceptions share no base
        name = "a product" if isinstance(graph, bytes) else graph
        raise TargetError(f"onnxruntime cannot load {name} on {device}: {error}") from error
    if (there := session.get_providers()[0]) != provider:
        raise TargetError(
            f"onnxruntime fell back from {provider} to {there}: the libraries of {device} are "
            f"missing or do not match{missing and f' ({missing})'}{_libraries(device)}"
        )
    return session


def _engines(
    path: Path, variant: Variant, device: str, settings: Any
) -> Callable[[Shape | None], onnxruntime.InferenceSession]:
    """What opens a session of TensorRT for batches of up to so many rows of so many tokens.

    TensorRT builds an engine for each, which takes minutes; it is kept.

    Raises:
        TargetError: it is a causal model's graph.
    """
    ort = need("onnxruntime", extra="onnx")
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain.add_session_config_entry("session.disable_prepacking", "1")
    inputs = [i.name for i in _session(path, "cpu", plain).get_inputs()]
    if "prefix" in inputs:
        raise TargetError(
            "TensorRT would build an engine for each length of a causal model's prefix: take "
            f"device {device.replace('tensorrt', 'cuda')}"
        )

    def opened(shape: Shape | None) -> onnxruntime.InferenceSession:
        more = {"precision": variant.precision, "inputs": inputs, "shape": shape}
        place = None
        if variant.files:
            nvidia.load_libraries(ort, device)
            key = keys.of_card(variant, "onnx", device, tensorrt=nvidia.tensorrt_version())
            place = cache.place("tensorrt", {**key, "shape": shape})
        session = cache.built(
            place, lambda folder: _session(path, device, settings, **more, engines=folder)
        )
        _require_most(session, device, variant)
        return session

    return opened


def _require_most(session: onnxruntime.InferenceSession, device: str, variant: Variant) -> None:
    """Refuse a graph if a device leaves most matrix products, nearly all of the work, to others.

    The CPU, or CUDA besides TensorRT, computes those silently. Older versions of onnxruntime do not
    report the assignment: with them, every graph is accepted.
    """
    tell = getattr(session, "get_provider_graph_assignment_info", list)
    products: Counter[str] = Counter()
    for part in tell():
        names = (node.op_type for node in part.get_nodes())
        products[part.ep_name] += sum("MatMul" in name or "Gemm" in name for name in names)
    if 2 * (here := products[PROVIDERS[kind(device)]]) < products.total():
        most = products.most_common(1)[0][0].removesuffix("ExecutionProvider")
        raise TargetError(
            f"onnxruntime computes only {here} of this graph's {products.total()} matrix products "
            f"on {device}, and most on {most}: "
            + ("name" if variant.precision == "fp16" else "convert the model to fp16, or name")
            + " another variant, or device cpu"
        )


def builds() -> list[str]:
    """The installed packages that are onnxruntime, like `onnxruntime-gpu`."""
    spec = find("onnxruntime")
    if spec is None or spec.origin is None:
        return []
    site = Path(spec.origin).parent.parent
    found = []
    # Others have similar names, such as onnxruntime-extensions.
    for record in site.glob("onnxruntime*.dist-info/RECORD"):
        if "onnxruntime/__init__.py," in record.read_text("utf-8"):
            found.append(record.parent.name.partition("-")[0].replace("_", "-"))
    return sorted(found)


def _conflict() -> str:
    """What is wrong if several onnxruntime builds are installed: they overwrite each other."""
    names = builds()
    if len(names) < 2:
        return ""
    return (
        f"{' and '.join(names)} overwrite each other: pip uninstall -y {' '.join(names)}, then "
        "install one of them again"
    )


def _advice(device: str) -> str:
    """What to do about a device that is absent; often ""."""
    if kind(device) not in nvidia.KINDS:
        return ""
    if conflict := _conflict():
        return f". {conflict}: {pip_line(_GPU)}"
    if PROVIDERS[kind(device)] not in need("onnxruntime", extra="onnx").get_available_providers():
        names = " ".join(builds())
        return f". This build has no CUDA: pip uninstall -y {names}, then {pip_line(_GPU)}"
    cards = nvidia.count()
    return f". NVIDIA's driver finds {cards} cards" if cards else ". NVIDIA's driver finds no card"


def _libraries(device: str) -> str:
    """What brings the libraries of a device; "" if qrank does not know."""
    if kind(device) == "tensorrt":
        return f": it takes {pip_line(_GPU)}, and the TensorRT that this onnxruntime was built with"
    return f": {pip_line(_GPU)}" if kind(device) == "cuda" else ""


_GPU = "gpu"
"""The extra with the build for NVIDIA's cards."""


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
            # Elsewhere, it comes after all floating point until it is measured.
            Precision("int8", EIGHT_BITS, cpu=2, elsewhere=4, stem=GRAPH_STEMS["int8"]),
            Precision("fp16", FLOAT16, bytes=2, cpu=8, elsewhere=1, stem=GRAPH_STEMS["fp16"]),
            Precision("fp32", FLOAT32, bytes=4, cpu=6, elsewhere=3, stem=GRAPH_STEMS["fp32"]),
            Precision("int4", FOUR_BITS, bytes=0.6, cpu=7, elsewhere=9, stem=GRAPH_STEMS["int4"]),
            Precision("bf16", BFLOAT16, made=False, elsewhere=2),
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
