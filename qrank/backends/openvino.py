"""OpenVINO graphs: CPUs, and Intel's GPUs and NPUs."""

from __future__ import annotations

import importlib
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.backends import keys
from qrank.backends.contract import GRAPH_STEMS, BackendSpec, Format, Options, Precision
from qrank.backends.mapped import LARGE, dropping_pages
from qrank.backends.openvino_cache import compile_or_load
from qrank.backends.openvino_graph import OpenvinoBackend
from qrank.backends.openvino_nodes import computed_weights, has_fused_mlp
from qrank.bundle.fidelity import BFLOAT16, EIGHT_BITS, FLOAT16, FLOAT32, FOUR_BITS
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats
from qrank.errors import TargetError
from qrank.scoring.batching import CPU_BATCHES, DEVICE_BATCHES, default_batch
from qrank.system import cache, machine
from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

WRONG_LENGTHS: dict[tuple[str, str | None], tuple[int, ...]] = {("int8-w8a8", "bf16"): (32,)}
"""Padded lengths for which OpenVINO's CPU plugin gives wrong logits, by precision and compute
dtype: with 2026.4 on AMX off by up to 4 at a spread of 3; other lengths are right. They are rounded
up one step further."""

GROUP = 64
"""Channels of a token whose activations share a scale when multiplied with int8 weights: twice as
fast as fp32 activations, as fast as groups of 128, and more exact than those."""

DECODER_GROUP = 32
"""The same for causal language models, in which a few channels are far larger than the rest."""

CAPABILITIES = {"bf16": "BF16", "fp16": "FP16", "fp32": "FP32"}
"""Compute dtypes, fastest first -> OpenVINO's name of the capability."""

_HINTS = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}

log = logging.getLogger("qrank")

_opened_in: list[int] = []
"""Process ids that opened a model, the first one first; a forked child inherits the list."""


def version() -> str:
    """The runtime's name and version."""
    return f"openvino {need('openvino', extra='openvino').__version__}"


def devices() -> list[str]:
    """Devices OpenVINO finds here: `cpu`, `gpu`, `npu`; `gpu.0`, `gpu.1` if there are several."""
    return [name.lower() for name in _core().available_devices]


def compute_dtypes(device: str) -> tuple[str, ...]:
    """Compute dtypes that a present device has hardware for, fastest first.

    Raises:
        TargetError: the device is absent.
    """
    core = _core()
    _require(core, device)
    able = core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    found = tuple(name for name, capability in CAPABILITIES.items() if capability in able)
    if device == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        # x86 CPUs that compute in fp16 also compute in bf16, five times as fast; and int8-w8a8 in
        # fp16 hangs there (2026.4, when several shapes run in succession).
        return tuple(name for name in found if name != "fp16")
    return found


def batches(device: str) -> tuple[int, ...]:
    """Padded tokens per batch worth trying, the default first; none for NPUs (static shapes)."""
    if device.startswith("npu"):
        return ()
    return CPU_BATCHES if device == "cpu" else DEVICE_BATCHES


def memory(device: str) -> int | None:
    """Bytes a GPU can use, its own or the machine's; None for other or absent devices."""
    if not device.startswith("gpu") or device not in devices():
        return None
    try:
        return int(_core().get_property(device.upper(), "GPU_DEVICE_TOTAL_MEM_SIZE"))
    except RuntimeError:  # the driver does not report it
        return None


def product(a: Floats, b: Floats, device: str) -> Floats:
    """The matrix product, computed on a device."""
    openvino, core = need("openvino", extra="openvino"), _core()
    ops = importlib.import_module("openvino.opset8")
    left, right = (ops.parameter(x.shape, np.float32) for x in (a, b))
    graph = openvino.Model([ops.matmul(left, right, False, False)], [left, right])
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return np.array(core.compile_model(graph, device.upper(), hint)([a, b])[0])


def open(folder: Path, variant: Variant, device: str, options: Options) -> OpenvinoBackend:
    """Load a variant's `model.xml` and `model.bin`.

    Args:
        folder: the bundle.
        variant: its folder holds the two files.
        device: one of `devices()`.
        options: `compute_dtype` None means fp32. Devices that need static shapes always get them.

    Raises:
        MissingExtraError: openvino is not installed.
        TargetError: the device is absent, cannot run the graph or would give wrong logits; the
            graph needs more threads; or this process was forked from one that opened a model.
    """
    core = _core()
    _require(core, device)
    if device == "cpu" and variant.precision == "int8-w8a8" and saturates():
        raise TargetError(
            "this CPU has no VNNI, without which sums of int8 products overflow: take int8, which "
            "computes in fp32, instead of int8-w8a8"
        )
    _opened_in.append(os.getpid())
    settings = _settings(device, variant, options)
    path = folder / variant.folder / "model.xml"
    weights = path.with_suffix(".bin")
    avoided = WRONG_LENGTHS.get((variant.precision, options.compute_dtype), ())
    unused: list[openvino.Model] = []

    def compiled(length: int | None) -> openvino.CompiledModel:
        """The graph for one pair of this length; for None, for any batch of any length."""
        model = unused.pop() if unused else core.read_model(path)
        if length is not None:
            model.reshape({i.any_name: _static(i, length) for i in model.inputs})
        with dropping_pages(weights):
            if device != "cpu":
                return core.compile_model(model, device.upper(), settings)

            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = DECODER_GROUP if decoder else GROUP
            # Kept for each length, the weights would be kept as often.
            place = None if length else _place(variant, weights, settings)
            made = compile_or_load(core, model, settings, place)
            fused = options.compute_dtype == "bf16" and has_fused_mlp(made)
            if fused and options.threads < 2:
                raise TargetError(
                    f"openvino fuses feed-forward layers of {variant.name} in "
                    f"{options.compute_dtype}, which takes two threads: allow more threads"
                )
            if fused or (options.threads > 1 and computed_weights(made)):
                made = compile_or_load(core, model, settings | {"NUM_STREAMS": 1}, place)
            return made

    try:
        model = core.read_model(path)
        limit = model.input("input_ids").partial_shape[1].max_length
        decoder = _is_decoder(model)
        # Given away when it is compiled, to hold it no longer than that.
        unused.append(model)
        del model
        if not options.static_shapes and not device.startswith("npu"):
            try:
                batch = options.max_batch_tokens or default_batch(device, decoder)
                return OpenvinoBackend(
                    compiled,
                    limit,
                    batch,
                    weights,
                    options.memory,
                    avoided,
                    spread=device == "cpu",
                )
            except RuntimeError as error:
                log.info("%s takes no dynamic shapes (%s): using static ones", device, error)
        return OpenvinoBackend(compiled, limit, None, weights, options.memory)
    except RuntimeError as error:
        raise TargetError(f"openvino cannot load {path} on {device}: {error}") from error


def saturates() -> bool:
    """Whether this CPU adds two int8 products in 16 bits, which can overflow: x86 without VNNI.

    On a Zen 1, a tiny BERT's logits were off by a quarter of their spread. If the system reports no
    instruction sets, only the probes can detect this.
    """
    known = set(machine.instruction_sets())
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and bool(known) and not known & {"VNNI", "AVX-VNNI"}


def _core() -> openvino.Core:
    """A new `openvino.Core`.

    Raises:
        TargetError: this process was forked from one that had opened a model. OpenVINO's threads
            (TBB's) do not survive a fork: models run for a while, then one blocks forever.
    """
    core = need("openvino", extra="openvino").Core
    if _opened_in and _opened_in[0] != os.getpid():
        raise TargetError(
            "openvino cannot run in a process forked from one that had opened a model with it: "
            "make the Reranker after the fork (no --preload), or take backend onnx"
        )
    # The bindings build tables on first use, under a lock that ignores Python's GIL: two streams
    # that need a table at the same time deadlock. So the tables are built here.
    need("openvino", extra="openvino").Tensor(np.zeros(1, np.int64)).element_type.to_dtype()
    return core()


def _require(core: openvino.Core, device: str) -> None:
    if device == "cpu":
        return  # always there; listing the devices would load the drivers of all
    present = [name.lower() for name in core.available_devices]
    if device not in present:
        raise TargetError(
            f"openvino here has no device {device!r}; present are: {', '.join(present)}"
        )


def _settings(device: str, variant: Variant, options: Options) -> dict[str, Any]:
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[options.compute_dtype or "fp32"]}
    if device != "cpu":
        settings["PERFORMANCE_HINT"] = "THROUGHPUT"
        if variant.files and (place := cache.place("openvino", keys.of_files(variant))):
            settings |= {"CACHE_DIR": str(place), "CACHE_MODE": "OPTIMIZE_SIZE"}
        return settings
    return {
        **settings,
        # One stream per thread: on 2 cores, 25 % more pairs per second than one stream on both.
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": options.threads,
        # With pinning, all worker processes of a web server would run on the same cores.
        "ENABLE_CPU_PINNING": False,
    }


def _is_decoder(model: openvino.Model) -> bool:
    return any("last" in i.names for i in model.inputs)


def _place(variant: Variant, weights: Path, settings: dict[str, Any]) -> Path | None:
    """Folder of a variant's graph compiled for the CPU; None if it is not kept.

    A compiled graph holds the weights, so that of a large model would fill the disk. It is the same
    for all numbers of threads and streams.
    """
    if not variant.files or weights.stat().st_size >= LARGE:
        return None
    how = {k: v for k, v in settings.items() if k not in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")}
    return cache.place("openvino", keys.of_graph(variant, "openvino", settings=how))


def _static(node: Any, length: int) -> list[int]:
    """An input's shape for one pair of a length, without a prefix."""
    if node.any_name in ("prefix", "keep"):
        return [0 if d.is_dynamic else d.get_length() for d in node.partial_shape]
    return [1] if node.any_name == "last" else [1, length]


SPEC = BackendSpec(
    runtime="OpenVINO",
    open=open,
    version=version,
    devices=devices,
    kinds=("cpu", "gpu", "npu"),
    modules=("openvino",),
    extra="openvino",
    format=Format(
        precisions=(
            Precision("int8", EIGHT_BITS, cpu=1, elsewhere=2, stem=GRAPH_STEMS["int8"]),
            # Slightly faster than int8 on some machines, and farther from the original.
            Precision("int8-w8a8", EIGHT_BITS, cpu=3, elsewhere=4),
            Precision("fp16", FLOAT16, bytes=2, cpu=4, elsewhere=1, stem=GRAPH_STEMS["fp16"]),
            Precision("int4", FOUR_BITS, bytes=0.6, cpu=5, elsewhere=9, stem=GRAPH_STEMS["int4"]),
            Precision("fp32", FLOAT32, made=False, elsewhere=3, stem=GRAPH_STEMS["fp32"]),
            Precision("bf16", BFLOAT16, made=False, elsewhere=8),
        ),
        converter="qrank.converters.openvino.export",
        exporters={"optimum": "qrank.converters.openvino.optimum"},
        importer="qrank.converters.openvino.prebuilt",
        suffix=".xml",
        weights="{stem}.bin",
    ),
    compute_dtypes=compute_dtypes,
    batches=batches,
    memory=memory,
    product=product,
)
