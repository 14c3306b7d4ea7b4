"""OpenVINO graphs: CPUs, and Intel's GPUs and NPUs."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.backends import keys
from qrank.backends.contract import GRAPH_STEMS, BackendSpec, Format, Options, Precision
from qrank.backends.mapped import LARGE, dropping_pages
from qrank.backends.openvino_cache import compile_or_load
from qrank.backends.openvino_graph import OpenvinoBackend
from qrank.backends.openvino_nodes import computed_weights, has_fused_mlp, keep_halves, may_fuse_mlp
from qrank.bundle.fidelity import BFLOAT16, EIGHT_BITS, FLOAT16, FLOAT32, FOUR_BITS
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats
from qrank.errors import TargetError
from qrank.scoring.batching import CPU_BATCHES, DEVICE_BATCHES, TILE_BATCHES, default_batch
from qrank.system import cache, machine
from qrank.system.extras import need
from qrank.system.signal_stack import SignalStack

if TYPE_CHECKING:
    import openvino

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

_never_closed: list[openvino.Core] = []
"""Those whose signal stack a thread has to keep."""


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
    if device == "cpu" and machine.x86():
        # x86 CPUs that compute in fp16 also compute in bf16, five times as fast; and int8-w8a8 in
        # fp16 hangs there (2026.4, when several shapes run in succession).
        return tuple(name for name in found if name != "fp16")
    return found


def batches(device: str) -> tuple[int, ...]:
    """Padded tokens per batch worth trying, the default first; none for NPUs (static shapes)."""
    if device.startswith("npu"):
        return ()
    if device != "cpu":
        return DEVICE_BATCHES
    return TILE_BATCHES if _has_tiles() else CPU_BATCHES


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
    unused: list[openvino.Model] = []
    two_threads = TargetError(
        f"openvino fuses feed-forward layers of {variant.name} in {options.compute_dtype}, which "
        "takes two threads: allow more threads"
    )

    def compiled(length: int | None) -> openvino.CompiledModel:
        """The graph for one pair of this length; for None, for any batch of any length."""
        model = unused.pop() if unused else core.read_model(path)
        if length is not None:
            model.reshape({i.any_name: _static(i, length) for i in model.inputs})
        with dropping_pages(weights):
            if device != "cpu":
                return core.compile_model(model, device.upper(), settings)

            def on_cpu(**more: Any) -> openvino.CompiledModel:
                group = DECODER_GROUP if decoder else GROUP
                every = {**settings, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group, **more}
                # Kept for each length, the weights would be kept as often.
                place = None if length else _place(variant, weights, every)
                return compile_or_load(core, model, every, place)

            in_bf16 = options.compute_dtype == "bf16"
            if in_bf16:
                keep_halves(model)
            if in_bf16 and decoder and _has_tiles() and may_fuse_mlp(model):
                if options.threads < 2:
                    raise two_threads
                made = on_cpu(NUM_STREAMS=1)
                if has_fused_mlp(made):
                    return made
            made = on_cpu()
            fused = in_bf16 and has_fused_mlp(made)
            if fused and options.threads < 2:
                raise two_threads
            if fused or (options.threads > 1 and computed_weights(made)):
                made = on_cpu(NUM_STREAMS=1)
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
                batch = options.max_batch_tokens
                batch = batch or default_batch(device, decoder, tiles=_has_tiles())
                return OpenvinoBackend(
                    compiled,
                    limit,
                    batch,
                    weights,
                    options.memory,
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
    return machine.x86() and bool(machine.instruction_sets()) and not machine.has_vnni()


def _has_tiles() -> bool:
    """Whether products in bf16 and int8 are computed in tiles: on CPUs with AMX."""
    return "AMX bf16" in machine.instruction_sets()


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
    stack, made = SignalStack(), core()
    # The CPU plugin, which this loads, replaces the signal stack (2026.4), and unmaps its own when
    # it is closed. If several are closed in any order but the reverse, or in another thread, the
    # unmapped one stays in use: Ctrl-C or SIGTERM was a segmentation fault.
    made.get_property("CPU", "FULL_DEVICE_NAME")
    if not stack.restore():
        _never_closed.append(made)
    return made


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

    A compiled graph holds the weights, so that of a large model would fill the disk.
    """
    if not variant.files or weights.stat().st_size >= LARGE:
        return None
    return cache.place("openvino", keys.of_graph(variant, "openvino", settings=settings))


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
