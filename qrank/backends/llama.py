"""llama.cpp through its low-level bindings, shared by its backends and its converter."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends.contract import kind, number
from qrank.backends.mapped import dropping_pages
from qrank.bundle.sequences import Floats
from qrank.errors import TargetError
from qrank.system import machine
from qrank.system.extras import need

DEVICES = {"cpu": "CPU", "cuda": "CUDA", "metal": "MTL", "vulkan": "Vulkan"}
"""Kind of device -> llama.cpp's name for it, which a number follows except for the CPU."""

log = logging.getLogger("qrank.llama")

_kept: list[object] = []
"""Objects that llama.cpp holds raw pointers to."""

_errors: deque[str] = deque(maxlen=3)
"""llama.cpp's last logged errors: its functions only return that they failed."""


@cache
def library() -> ModuleType:
    """The bindings, with llama.cpp's log redirected to Python's (logger "qrank.llama").

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    with _threads_that_sleep():
        llama = need("llama_cpp", extra="gguf")
    info, warning, error = 2, 3, 4  # of enum ggml_log_level
    # One level lower than llama.cpp's: what users must know is raised as an error.
    levels = {info: logging.DEBUG, warning: logging.INFO, error: logging.INFO}

    def write(level: int, text: bytes, _: object) -> None:
        if line := text.decode("utf-8", "replace").strip(" .\n"):
            if level == error:
                _errors.append(line)
            log.log(levels.get(level, logging.DEBUG), "%s", line)

    callback = llama.llama_log_callback(write)
    llama.llama_log_set(callback, None)
    _kept.append(callback)
    llama.llama_backend_init()
    return llama


@contextmanager
def _threads_that_sleep() -> Iterator[None]:
    """Let OpenMP's threads sleep while they wait, not spin; it reads this when it is loaded.

    A layer has many steps, after each of which all threads wait for the last. Beside another busy
    process, one that spins keeps the last one from running: on 2 shared cores, that took 20 times
    as long.
    """
    name = "OMP_WAIT_POLICY"
    chosen = os.environ.get(name)
    os.environ.setdefault(name, "passive")
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[name]


@cache
def tensors() -> Any:
    """ggml's tensor functions, through ctypes."""
    library()
    ggml = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
    ggml.ggml_nbytes.restype = ctypes.c_size_t
    sizes = [ctypes.c_size_t, ctypes.c_size_t]
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *sizes]
    ggml.ggml_backend_tensor_get.restype = None
    return ggml


def product(a: Floats, b: Floats, device: str) -> Floats:
    """The matrix product, computed on a device."""
    ggml = tensors()
    pointer, size, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    types = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, long, long]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_backend_dev_init": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_alloc_ctx_tensors": (pointer, [pointer, pointer]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_backend_graph_compute": (ctypes.c_int, [pointer, pointer]),
    }
    for name, (result, arguments) in types.items():
        getattr(ggml, name).restype, getattr(ggml, name).argtypes = result, arguments
    backend = ggml.ggml_backend_dev_init(device_pointer(device), None)
    context = ggml.ggml_init(_InitParams(2**20, None, True))
    # ggml's first dimension is numpy's last, and its product multiplies rows with rows.
    factors = [np.ascontiguousarray(x, np.float32) for x in (b.T, a)]
    inputs = [ggml.ggml_new_tensor_2d(context, 0, x.shape[1], x.shape[0]) for x in factors]
    output = ggml.ggml_mul_mat(context, *inputs)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, output)
    buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
    for tensor, x in zip(inputs, factors, strict=True):
        ggml.ggml_backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
    status = ggml.ggml_backend_graph_compute(backend, graph)
    found = np.empty((a.shape[0], b.shape[1]), np.float32)
    ggml.ggml_backend_tensor_get(output, found.ctypes.data, 0, found.nbytes)
    for free, held in (
        (ggml.ggml_backend_buffer_free, buffer),
        (ggml.ggml_free, context),
        (ggml.ggml_backend_free, backend),
    ):
        free.restype, free.argtypes = None, [pointer]
        free(held)
    if status:
        raise TargetError(f"llama.cpp failed on {device} (status {status}): {complaint()}")
    return found


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def complaint() -> str:
    """The errors that llama.cpp logged since the last call; clears them."""
    text = "; ".join(_errors)
    _errors.clear()
    return text or 'it gave no reason; see the logger "qrank.llama"'


def version() -> str:
    """The runtime's name and version."""
    return f"llama-cpp-python {library().__version__}"


@cache
def device_pointer(device: str) -> int | None:
    """llama.cpp's pointer to a device; None if this build does not support it or finds none."""
    name = DEVICES[kind(device)] + ("" if device == "cpu" else str(number(device)))
    found: int | None = tensors().ggml_backend_dev_by_name(name.encode())
    return found


def repacks() -> bool:
    """Whether llama.cpp may repack weights for this CPU's kernels.

    Not on CPUs with AMX: llama.cpp's AMX kernel then crashes with SIGSEGV, for q8_0 always
    (ggml_backend_amx_mul_mat, https://github.com/ggml-org/llama.cpp/issues/20824).
    """
    return "AMX int8" not in machine.instruction_sets()


def load(path: Path, device: str) -> object:
    """Load a file's model entirely onto a device that is present.

    Raises:
        TargetError: llama.cpp cannot load the file there.
    """
    llama = library()
    settings = llama.llama_model_default_params()
    # A null-terminated list; an empty one means the CPU.
    chosen = (ctypes.c_void_p * 2)(None if device == "cpu" else device_pointer(device), None)
    settings.devices = ctypes.cast(chosen, ctypes.c_void_p)
    settings.n_gpu_layers = 0 if device == "cpu" else -1
    settings.use_extra_bufts = repacks()
    _errors.clear()
    # Weights that it repacks, or copies to a GPU, are read from the file only once.
    with dropping_pages(path):
        model: object = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise TargetError(f"llama.cpp cannot load {path} on {device}: {complaint()}")
    return model


def new_context(model: object, tokens: int, sequences: int, **settings: object) -> object:
    """Create a context for a model to compute in.

    Args:
        model: from `load`.
        tokens: its capacity, over all sequences.
        sequences: maximum number of sequences.
        settings: more of llama.cpp's llama_context_params.

    Raises:
        TargetError: there is no memory for that many tokens.
    """
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = tokens
    params.n_seq_max = sequences
    params.kv_unified = True
    # Flash attention: besides being fast, its memory does not grow quadratically with the length.
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    for name, value in settings.items():
        setattr(params, name, value)
    _errors.clear()
    pointer: object = llama.llama_init_from_model(model, params)
    if not pointer:
        raise TargetError(f"llama.cpp cannot make room for {tokens} tokens: {complaint()}")
    return pointer


def places(
    lengths: NDArray[np.int64], before: int = 0, first: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Position and sequence number of each token, for concatenated sequences.

    Args:
        lengths: tokens of each sequence, shape [n].
        before: position of each sequence's first token.
        first: number of the first sequence.

    Returns:
        Two arrays of shape [sum of lengths].
    """
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = np.arange(int(lengths.sum())) - starts + before
    owners = np.repeat(np.arange(first, first + len(lengths)), lengths)
    return positions.astype(np.int32), owners.astype(np.int32)


def run(
    function: Any,
    context: object,
    ids: NDArray[np.int32],
    positions: NDArray[np.int32],
    owners: NDArray[np.int32],
    outputs: NDArray[np.int8] | None = None,
) -> None:
    """Compute one batch.

    Args:
        function: llama.cpp's llama_encode or llama_decode.
        context: from `new_context`, with room for the batch; otherwise llama.cpp aborts.
        ids: tokens, shape [tokens].
        positions: of each token in its sequence.
        owners: sequence number of each token.
        outputs: 1 for tokens whose result is wanted; None to let the function decide.

    Raises:
        TargetError: llama.cpp failed.
    """
    counts = np.ones(len(ids), np.int32)
    # A token may belong to several sequences: each gets a pointer to a list, here of one.
    lists = (owners.ctypes.data + owners.itemsize * np.arange(len(ids))).astype(np.uintp)
    number = ctypes.POINTER(ctypes.c_int32)
    batch = library().llama_batch(
        n_tokens=len(ids),
        token=ids.ctypes.data_as(number),
        pos=positions.ctypes.data_as(number),
        n_seq_id=counts.ctypes.data_as(number),
        seq_id=lists.ctypes.data_as(ctypes.POINTER(number)),
    )
    if outputs is not None:
        batch.logits = outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    _errors.clear()
    if function(context, batch):
        raise TargetError(f"llama.cpp failed: {complaint()}")
