"""GGUF files on llama.cpp: the CPU, and the GPU its build was made for."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from qrank.backends import Options
from qrank.batching import cut_ragged, in_order
from qrank.bundle import Variant
from qrank.errors import TargetError
from qrank.extras import need
from qrank.work import Logits, Work

FILE = "model.gguf"

TYPE_STRIDE = "qrank.type_stride"
"""Metadata key: rows of the vocabulary before it begins anew, shifted to the next token type.
llama.cpp gives every token type 0; so type t is reached by adding t times this to an id."""

DEVICES = {"cpu": "CPU", "cuda": "CUDA0", "metal": "MTL0", "vulkan": "Vulkan0"}
"""What llama.cpp calls a device; the first of its kind."""

MAX_SEQUENCES = {"cpu": 1}
"""Pairs a batch. On the CPU each is its own: llama.cpp's fused attention, there twice as fast as
the other (MiniLM's shape, 52 to 512 tokens), moves a quantized model's logits by 3 % of their
spread with the neighbours in the batch; and only pairs of 15 to 40 tokens ran faster together."""

MAX_SEQUENCES_ELSEWHERE = 256
"""LLAMA_MAX_SEQ, with which llama.cpp is compiled."""

BATCH = 2048
"""Tokens a batch of several pairs. Attention is computed over all of it, neighbours masked."""

_GROWTH = 256
"""Contexts are made for a multiple of so many tokens."""

log = logging.getLogger("qrank.llama")

_kept: list[object] = []
"""What llama.cpp holds bare pointers to."""

_errors: deque[str] = deque(maxlen=3)
"""What llama.cpp last complained of: its functions say no more than that they failed."""


@cache
def library() -> ModuleType:
    """The bindings, with llama.cpp's log going to Python's (logger "qrank.llama").

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    llama = need("llama_cpp")
    info, warning, error = 2, 3, 4  # of enum ggml_log_level
    # A level lower than llama.cpp's: what a user must know is raised.
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


def complaint() -> str:
    """What llama.cpp logged as errors since this was last asked."""
    text = "; ".join(_errors)
    _errors.clear()
    return text or 'it gave no reason; see the logger "qrank.llama"'


def version() -> str:
    """The runtime's name and version."""
    return f"llama-cpp-python {library().__version__}"


def devices() -> list[str]:
    """Devices that this build of llama.cpp was made for and finds here."""
    return [device for device in DEVICES if _device(device)]


def open(folder: Path, variant: Variant, device: str, options: Options) -> GgufBackend:
    """Load a variant's `model.gguf`.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        TargetError: the device is absent, or llama.cpp cannot load the file on it.
    """
    if device not in (present := devices()):
        raise TargetError(
            f"{version()} here has no device {device!r}; present are: {', '.join(present)}. "
            "llama-cpp-python is compiled for one GPU or none: see the README"
        )
    path = folder / variant.name / FILE
    llama = library()
    settings = llama.llama_model_default_params()
    # Up to the null; without any, the CPU.
    chosen = (ctypes.c_void_p * 2)(None if device == "cpu" else _device(device), None)
    settings.devices = ctypes.cast(chosen, ctypes.c_void_p)
    settings.n_gpu_layers = 0 if device == "cpu" else -1
    _errors.clear()
    model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise TargetError(f"llama.cpp cannot load {path} on {device}: {complaint()}")
    sequences = MAX_SEQUENCES.get(device, MAX_SEQUENCES_ELSEWHERE)
    return GgufBackend(model, sequences, threads=options.threads if device == "cpu" else 1)


class GgufBackend:
    """A model, and for every thread a context: what it computes in. Contexts share the weights.

    Batches run side by side, a thread each. A call of fewer batches than threads takes idle
    contexts along and runs on their threads.
    """

    def __init__(self, model: object, sequences: int, *, threads: int) -> None:
        self._model = model
        self._sequences = sequences
        self._threads = threads
        self._stride = _type_stride(model)
        self._idle: SimpleQueue[_Context] = SimpleQueue()
        for _ in range(threads):
            self._idle.put(_Context(model, sequences))
        # Never the caller's thread: OpenMP's helpers of a thread do not survive a fork, and it
        # would wait for them.
        self._workers = ThreadPoolExecutor(threads, "qrank-gguf")

    def logits(self, work: Work) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        batches = cut_ragged(work.lengths, BATCH, self._sequences)
        width = max(self._threads // len(batches), 1)
        results = self._workers.map(lambda b: self._run(work.take(b), width), batches)
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._workers.shutdown()
        for _ in range(self._threads):
            self._idle.get().close()
        library().llama_model_free(self._model)

    def _run(self, batch: Work, width: int) -> Logits:
        held = [self._idle.get()]
        try:
            while len(held) < width and not self._idle.empty():
                held.append(self._idle.get_nowait())
            return held[0].run(self._ids(batch), batch.lengths, threads=len(held))
        finally:
            for context in held:
                self._idle.put(context)

    def _ids(self, batch: Work) -> NDArray[np.int32]:
        """Token ids of a batch, one after the other, as the file's vocabulary counts them."""
        ids = np.concatenate(batch.sequences).astype(np.int32)
        if batch.segments is not None:
            ids += np.concatenate(batch.segments).astype(np.int32) * self._stride
        return ids


class _Context:
    """What one batch at a time is computed in; made at its first use, anew for a larger batch."""

    def __init__(self, model: object, sequences: int) -> None:
        self._model = model
        self._sequences = sequences
        self._size = 0
        self._pointer: object = None

    def run(self, ids: NDArray[np.int32], lengths: NDArray[np.int64], threads: int) -> Logits:
        """Logits of the sequences that lie in `ids` one after the other, shape [n]."""
        llama = library()
        self._fit(len(ids))
        llama.llama_set_n_threads(self._pointer, threads, threads)
        owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = (np.arange(len(ids)) - starts).astype(np.int32)
        counts = np.ones(len(ids), np.int32)
        # A token may be of several sequences: a pointer each to its list, which is of one.
        lists = (owners.ctypes.data + owners.itemsize * np.arange(len(ids))).astype(np.uintp)
        number = ctypes.POINTER(ctypes.c_int32)
        batch = llama.llama_batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(number),
            pos=positions.ctypes.data_as(number),
            n_seq_id=counts.ctypes.data_as(number),
            seq_id=lists.ctypes.data_as(ctypes.POINTER(number)),
        )
        _errors.clear()
        if llama.llama_encode(self._pointer, batch):
            raise TargetError(f"llama.cpp failed: {complaint()}")
        values = [llama.llama_get_embeddings_seq(self._pointer, i) for i in range(len(lengths))]
        return np.array([value[0] for value in values], np.float32)

    def close(self) -> None:
        """Free the context; a later run makes it again."""
        if self._pointer:
            library().llama_free(self._pointer)
        self._pointer = None

    def _fit(self, tokens: int) -> None:
        """Make room for a batch. llama.cpp ends the process where there is none."""
        if self._pointer and tokens <= self._size:
            return
        self.close()
        self._size = -(-tokens // _GROWTH) * _GROWTH
        llama = library()
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self._size
        settings.n_seq_max = self._sequences
        settings.kv_unified = True
        settings.embeddings = True
        settings.pooling_type = llama.LLAMA_POOLING_TYPE_RANK
        # Its memory does not grow with the square of the length, either.
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.no_perf = True
        _errors.clear()
        self._pointer = llama.llama_init_from_model(self._model, settings)
        if not self._pointer:
            raise TargetError(f"llama.cpp cannot make room for {tokens} tokens: {complaint()}")


@cache
def _device(device: str) -> int | None:
    """Pointer to llama.cpp's device; None where there is none."""
    library()
    find = importlib.import_module("llama_cpp._ggml").libggml.ggml_backend_dev_by_name
    find.argtypes, find.restype = [ctypes.c_char_p], ctypes.c_void_p
    found: int | None = find(DEVICES[device].encode())
    return found


def _type_stride(model: object) -> int:
    """The number at TYPE_STRIDE; 0 in files without."""
    text = ctypes.create_string_buffer(16)
    library().llama_model_meta_val_str(model, TYPE_STRIDE.encode(), text, len(text))
    return int(text.value or 0)
