"""GGUF files on llama.cpp: the CPU, and the GPU its build was made for."""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends import Options
from qrank.batching import cut_ragged
from qrank.bundle import Variant
from qrank.errors import TargetError
from qrank.extras import need
from qrank.work import Logits, Work

FILE = "model.gguf"

TYPE_STRIDE = "qrank.type_stride"
"""Metadata key: rows of the vocabulary before it begins anew, shifted to the next token type.
llama.cpp gives every token type 0; so type t is reached by adding t times this to an id."""

REGISTRIES = {"cpu": "CPU", "cuda": "CUDA", "metal": "MTL", "vulkan": "Vulkan"}
"""llama.cpp's name of the backend that runs a device."""

CPU_BATCH = 160
"""Tokens a batch on the CPU. Attention is computed over the whole batch, neighbours masked, so
larger ones cost more than they save (measured: docs/benchmarks.md)."""

DEVICE_BATCH = 2048
"""Tokens a batch on a GPU, which wants larger ones."""

MAX_SEQUENCES = 256
"""LLAMA_MAX_SEQ: llama.cpp is compiled with it."""

log = logging.getLogger("qrank.llama")

_errors: deque[str] = deque(maxlen=3)
"""What llama.cpp last complained of: its functions return no more than that they failed."""


@cache
def library() -> ModuleType:
    """The bindings, with llama.cpp's log going to Python's."""
    llama = need("llama_cpp")
    # ggml: debug 4, info 1, warn 2, error 3, and 5 continues a line. One level lower than there:
    # what needs acting on is raised.
    levels = {2: logging.INFO, 3: logging.INFO}

    def write(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", "replace").strip(" .\n")
        if level == 3 and line:
            _errors.append(line)
        if line:
            log.log(levels.get(level, logging.DEBUG), "%s", line)

    callback = llama.llama_log_callback(write)
    llama.llama_log_set(callback, None)
    llama._qrank_log = callback  # the library keeps a bare pointer to it
    llama.llama_backend_init()
    return llama


def complaint() -> str:
    """What llama.cpp logged as errors since the last call."""
    text = "; ".join(_errors)
    _errors.clear()
    return text or "llama.cpp gave no reason (see the logger qrank.llama)"


def version() -> str:
    """The runtime's name and version."""
    return f"llama-cpp-python {library().__version__}"


def devices() -> list[str]:
    """Devices this build of llama.cpp has, and this machine too."""
    present = _registries()
    return [device for device, name in REGISTRIES.items() if name in present]


def open(folder: Path, variant: Variant, device: str, options: Options) -> GgufBackend:
    """Load a variant's `model.gguf`.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        TargetError: the device is absent, or llama.cpp cannot load the file on it.
    """
    if device not in (present := devices()):
        raise TargetError(
            f"{version()} here has no device {device!r}; present are: {', '.join(present)}. "
            "A GPU wants a build for it: see CMAKE_ARGS in the README"
        )
    return GgufBackend(folder / variant.name / FILE, device, options.threads)


class GgufBackend:
    """One model, and on the CPU a narrow context a stream that share its weights."""

    def __init__(self, path: Path, device: str, threads: int) -> None:
        llama = library()
        self._llama = llama
        settings = llama.llama_model_default_params()
        on_cpu = device == "cpu"
        # Ends at the null: none but these.
        chosen = (ctypes.c_void_p * 2)(None if on_cpu else _registries()[REGISTRIES[device]], None)
        settings.devices = ctypes.cast(chosen, ctypes.c_void_p)
        settings.n_gpu_layers = 0 if on_cpu else -1
        _errors.clear()
        self._model = llama.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise TargetError(f"llama.cpp cannot load {path} on {device}: {complaint()}")
        self._stride = int(_metadata(llama, self._model, TYPE_STRIDE) or 0)
        self._batch = CPU_BATCH if on_cpu else DEVICE_BATCH
        self._streams = threads if on_cpu else 1
        self._threads = threads
        self._contexts: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._streams):
            self._contexts.put(None)
        # Threads of its own: OpenMP's do not survive a fork on the thread that had used them.
        self._workers = ThreadPoolExecutor(self._streams, "qrank-gguf")
