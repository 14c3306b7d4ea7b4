"""NVIDIA's GPUs: how many there are, their memory, and onnxruntime's settings for them."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from qrank.backends.contract import kind, number
from qrank.system.extras import find

KINDS = ("cuda", "tensorrt")
"""Kinds of devices that are NVIDIA's cards."""

_HALF = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable"}
"""Precision -> TensorRT's option, without which it refuses a graph of this type."""


def count() -> int:
    """Cards that this process sees: CUDA_VISIBLE_DEVICES applies. 0 without CUDA's driver."""
    found = ctypes.c_int()
    driver = _driver()
    return 0 if driver is None or driver.cuDeviceGetCount(ctypes.byref(found)) else found.value


def memory(device: str) -> int | None:
    """Bytes of a present card's memory; None if the driver does not report it."""
    card, size = ctypes.c_int(), ctypes.c_size_t()
    driver = _driver()
    failed = (
        driver is None
        or driver.cuDeviceGet(ctypes.byref(card), number(device))
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), card)
    )
    return None if failed else size.value


def _driver() -> Any:
    """CUDA's driver, or None; qrank looks at it only when such a device is asked for."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def load_libraries(ort: Any, device: str) -> str:
    """Load CUDA's libraries, and TensorRT's, from where pip installs them.

    onnxruntime itself only looks where the system does.

    Returns:
        What is missing, in the loader's words; "" if nothing is, or if it does not say.
    """
    said = io.StringIO()
    if load := getattr(ort, "preload_dlls", None):  # from 1.21 on
        with redirect_stdout(said):  # it prints
            load()
    if kind(device) == "tensorrt" and (spec := find("tensorrt_libs")):
        for folder in spec.submodule_search_locations or ():
            # The others need the first.
            for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
                for path in Path(folder).glob(f"lib{name}.so.*"):
                    try:
                        ctypes.CDLL(str(path))
                    except OSError as error:
                        said.write(f"{error}\n")
    return said.getvalue().partition("\n")[0]


def tensorrt_version() -> int | None:
    """TensorRT's version as it numbers itself, 101600 for 10.16; None if it is not there."""
    form = "nvinfer_{}.dll" if os.name == "nt" else "libnvinfer.so.{}"
    for major in _TENSORRT:
        try:
            return int(ctypes.CDLL(form.format(major)).getInferLibVersion())
        except OSError:
            continue
    return None


_TENSORRT = range(10, 14)
"""TensorRT's major versions that some onnxruntime may be built with."""


def providers(
    names: dict[str, str],
    device: str,
    *,
    precision: str = "",
    inputs: Iterable[str] = (),
    shape: tuple[int, int] | None = None,
    engines: Path | None = None,
) -> list[tuple[str, dict[str, str]]]:
    """onnxruntime's execution providers for a card, with their options, the preferred one first.

    Args:
        names: kind of device -> provider.
        device: of KINDS, with a number from the second on.
        precision: the graph's, for TensorRT.
        inputs: names of the graph's inputs, for TensorRT.
        shape: of all inputs, rows and tokens, for TensorRT: up to so many rows of so many tokens.
        engines: folder of the built engines, for TensorRT; None: they are not kept.
    """
    cuda = {
        "device_id": str(number(device)),
        # By default the arena doubles.
        "arena_extend_strategy": "kSameAsRequested",
        # fp32 is fp32: TF32 rounds to 10 bits of mantissa, beyond the tolerance of fp32.
        "use_tf32": "0",
    }
    found = [(names["cuda"], cuda)]
    if kind(device) == "cuda":
        return found
    engine = {"device_id": cuda["device_id"]}
    if precision in _HALF:
        engine[_HALF[precision]] = "True"
    if shape is not None:
        rows, tokens = shape
        least = ",".join(f"{name}:1x{tokens}" for name in inputs)
        most = ",".join(f"{name}:{rows}x{tokens}" for name in inputs)
        engine |= {
            "trt_profile_min_shapes": least,
            "trt_profile_opt_shapes": most,
            "trt_profile_max_shapes": most,
        }
    if engines is not None:
        engine |= {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(engines),
        }
    # What TensorRT does not take runs in CUDA.
    return [(names["tensorrt"], engine), *found]
