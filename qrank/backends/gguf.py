"""GGUF files on llama.cpp: the CPU, and the GPU its build supports."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from qrank.backends import llama
from qrank.backends.contract import Backend, BackendSpec, Format, Options, Precision
from qrank.backends.gguf_context import Context, freed_with
from qrank.backends.gguf_decoder import HEAD, GgufDecoder
from qrank.bundle.fidelity import BFLOAT16, EIGHT_BITS, FLOAT16, FLOAT32, FOUR_BITS
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import TargetError
from qrank.scoring.batching import cut_ragged, in_order
from qrank.scoring.memory import MemoryBudget

FILE = "model.gguf"

TYPE_STRIDE = "qrank.type_stride"
"""Metadata key: rows per copy of the vocabulary; the file holds one copy per token type.
llama.cpp gives every token type 0, so type t is selected by adding t times this to an id."""

MAX_SEQUENCES = {"cpu": 1}
"""Pairs per batch. On the CPU each pair is its own batch: llama.cpp's fused attention, which is
twice as fast there as the unfused one (MiniLM's shape, 52 to 512 tokens), makes a quantized model's
logits depend on the other pairs in the batch, by 3 % of the logits' spread; and only pairs of 15 to
40 tokens ran faster together."""

MAX_SEQUENCES_ELSEWHERE = 255
"""LLAMA_MAX_SEQ, which is compiled into llama.cpp, minus one for a decoder's prefix."""

BATCH = 2048
"""Tokens per batch of several pairs. Attention covers the whole batch, with other pairs masked."""

_LIKE_EIGHT_BITS = ("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0")
_LIKE_FOUR_BITS = ("q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs")
"""Other precisions of prebuilt files, by the tolerance that applies to them."""

_GROWTH = 256
"""A context's capacity in tokens is a multiple of this."""


def devices() -> list[str]:
    """Devices that this build of llama.cpp supports and finds here: `cpu`, `cuda`, `cuda:1`, ..."""
    found: list[str] = []
    for device in llama.DEVICES:
        names = (f"{device}:{number}" if number else device for number in count())
        # They are numbered without gaps; there is one CPU.
        found += takewhile(llama.device_pointer, ["cpu"] if device == "cpu" else names)
    return found


def memory(device: str) -> int | None:
    """Bytes of a device's memory; None if the device is absent."""
    if device not in devices():
        return None
    tell = llama.tensors().ggml_backend_dev_memory
    tell.restype, tell.argtypes = None, [ctypes.c_void_p] + 2 * [ctypes.POINTER(ctypes.c_size_t)]
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    tell(llama.device_pointer(device), ctypes.byref(free), ctypes.byref(total))
    return total.value or None


def open(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """Load a variant's `model.gguf`, and its head if that is in a separate file.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        TargetError: the device is absent, or llama.cpp cannot load the file on it.
    """
    if device not in (present := devices()):
        raise TargetError(
            f"{llama.version()} here has no device {device!r}; present are: {', '.join(present)}. "
            "llama-cpp-python is compiled for one GPU or none: see the README"
        )
    files = folder / variant.folder
    model = llama.load(files / FILE, device)
    sequences = MAX_SEQUENCES.get(device, MAX_SEQUENCES_ELSEWHERE)
    head = np.load(files / HEAD) if (files / HEAD).is_file() else None
    if head is not None and _metadata(model, "llama-embed.attention.causal") != "false":
        # A state that each token changes: llama.cpp computes batches of it in another order.
        alone = llama.library().llama_model_is_hybrid(model)
        return GgufDecoder(model, head, 1 if alone else sequences, options)
    threads = options.threads if device == "cpu" else 1
    return GgufBackend(model, head, sequences, threads=threads, memory=options.memory)


class GgufBackend:
    """An encoder with one context per thread to compute in; the contexts share the weights.

    Batches run in parallel, one thread each. If a call has fewer batches than there are threads,
    each batch reserves idle contexts as well and uses their threads.
    """

    def __init__(
        self,
        model: object,
        head: NDArray[np.float32] | None,
        sequences: int,
        *,
        threads: int,
        memory: MemoryBudget,
    ) -> None:
        """Take ownership of a model.

        Args:
            model: from `llama.load`.
            head: the weights that turn the mean hidden state into the logit, float32 [hidden];
                None if the model file includes the head.
            sequences: maximum number in a batch.
            threads: number of threads, and of contexts.
            memory: budget for batches.
        """
        self._memory = memory
        self._head = head
        self._sequences = sequences
        self._threads = threads
        self._stride = int(_metadata(model, TYPE_STRIDE) or 0)
        kind = "RANK" if head is None else "MEAN"
        pooling = getattr(llama.library(), f"LLAMA_POOLING_TYPE_{kind}")
        contexts = [
            Context(
                model,
                sequences,
                _GROWTH,
                lambda room: {"n_ubatch": room, "embeddings": True, "pooling_type": pooling},
            )
            for _ in range(threads)
        ]
        self._idle: SimpleQueue[Context] = SimpleQueue()
        for context in contexts:
            self._idle.put(context)
        self._free = freed_with(self, model, contexts)
        # Never compute on the caller's thread: its OpenMP helper threads do not survive a fork, and
        # the child would wait for them forever.
        self._workers = ThreadPoolExecutor(threads, "qrank-gguf")

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        largest = self._memory.max_batch_size
        batches = cut_ragged(sequences.lengths, BATCH, self._sequences, largest)
        width = max(self._threads // len(batches), 1)
        results = self._workers.map(lambda b: self._run(sequences.take(b), width), batches)
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._workers.shutdown()
        self._free()

    def _run(self, batch: Sequences, width: int) -> Logits:
        held = [self._idle.get()]
        try:
            # Another thread may take the last one first.
            with suppress(Empty):
                while len(held) < width:
                    held.append(self._idle.get_nowait())
            with self._memory.reserve(len(batch), int(batch.lengths.max())):
                return self._compute(batch, held[0], threads=len(held))
        finally:
            for context in held:
                self._idle.put(context)

    def _compute(self, batch: Sequences, context: Context, threads: int) -> Logits:
        """Logits of a batch, shape [n]."""
        library, ids = llama.library(), self._ids(batch)
        pointer = context.fit(len(ids))
        library.llama_set_n_threads(pointer, threads, threads)
        llama.run(library.llama_encode, pointer, ids, *llama.places(batch.lengths))
        values = [library.llama_get_embeddings_seq(pointer, i) for i in range(len(batch))]
        if self._head is None:
            return np.array([value[0] for value in values], np.float32)
        means = np.stack([np.ctypeslib.as_array(value, self._head.shape) for value in values])
        logits: Logits = means @ self._head
        return logits

    def _ids(self, batch: Sequences) -> NDArray[np.int32]:
        """A batch's token ids, concatenated, as rows of the file's vocabulary."""
        ids = np.concatenate(batch.ids).astype(np.int32)
        if batch.segments is not None:
            ids += np.concatenate(batch.segments).astype(np.int32) * self._stride
        return ids


def _metadata(model: object, key: str) -> str:
    """The value of a metadata key in the file; "" if it is missing."""
    text = ctypes.create_string_buffer(16)
    llama.library().llama_model_meta_val_str(model, key.encode(), text, len(text))
    return text.value.decode()


def _note(device: str) -> str:
    if device == "cpu" and not llama.repacks():
        return "without AMX, whose kernels crash: llama.cpp issue 20824"
    return ""


SPEC = BackendSpec(
    runtime="llama.cpp",
    open=open,
    version=llama.version,
    devices=devices,
    kinds=tuple(llama.DEVICES),
    modules=("llama_cpp",),
    extra="gguf",
    format=Format(
        precisions=(
            Precision("q4_k_m", FOUR_BITS, bytes=0.5, cpu=10, elsewhere=7, stem="q4_k_m$"),
            Precision("q8_0", EIGHT_BITS, cpu=9, elsewhere=6, stem="q8_0$"),
            Precision("f16", FLOAT16, bytes=2, cpu=11, elsewhere=5, stem="f16$"),
            Precision("f32", FLOAT32, made=False),
            Precision("bf16", BFLOAT16, made=False, elsewhere=8),
            *(Precision(name, EIGHT_BITS, made=False) for name in _LIKE_EIGHT_BITS),
            *(Precision(name, FOUR_BITS, made=False) for name in _LIKE_FOUR_BITS),
        ),
        converter="qrank.converters.gguf.export",
        importer="qrank.converters.gguf.prebuilt",
        suffix=".gguf",
    ),
    memory=memory,
    product=llama.product,
    note=_note,
)
