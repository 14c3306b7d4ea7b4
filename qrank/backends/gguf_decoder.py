"""Causal models on llama.cpp: the prefix is read once, the head is exact.

llama.cpp cannot score with a custom head, and returns hidden states only in a mode that computes
the logits of the whole vocabulary for every token. So we take the last hidden state out of its
graph during the computation, for last tokens only, and apply the head here in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qrank.backends import llama
from qrank.backends.contract import Options
from qrank.backends.gguf_context import Context, freed_with
from qrank.bundle.sequences import Ids, Logits, Sequences
from qrank.scoring.batching import cut_ragged, in_order

HEAD = "head.npy"
"""File next to the model's that holds the score head's row, float32 [hidden]."""

BATCH = 2048
"""Tokens per batch of several sequences."""

PHYSICAL_BATCH = 512
"""Tokens llama.cpp computes at once, keeping all their intermediate results."""

_STATE = b"result_norm"
"""llama.cpp's name for the hidden states after the last norm, for tokens with requested outputs."""

_GROWTH = 1024
"""A context's capacity in tokens is a multiple of this."""


class GgufDecoder:
    """A model with a single context that runs batch by batch on its own thread."""

    def __init__(
        self, model: object, head: NDArray[np.float32], sequences: int, options: Options
    ) -> None:
        """Take ownership of a model.

        Args:
            model: from `llama.load`.
            head: the score head's row, float32 [hidden].
            sequences: maximum number in a batch.
            options: threads that llama.cpp computes on, and the memory budget for batches.
        """
        self._head = head
        self._sequences = sequences
        self._memory = options.memory
        self._states: list[NDArray[np.float32]] = []
        look = llama.library().ggml_backend_sched_eval_callback(_looking(self._states))
        threads = {"n_threads": options.threads, "n_threads_batch": options.threads}
        self._context = Context(
            model,
            sequences + 1,
            _GROWTH,
            lambda room: {"n_ubatch": min(room, PHYSICAL_BATCH), "cb_eval": look, **threads},
        )
        self._free = freed_with(self, model, [self._context])
        # Never the caller's thread (see `qrank.backends.gguf.GgufBackend`), and one call at a time.
        self._worker = ThreadPoolExecutor(1, "qrank-gguf")

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        return self._worker.submit(self._run, sequences).result()

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._worker.shutdown()
        self._free()

    def _run(self, sequences: Sequences) -> Logits:
        before = len(sequences.prefix)
        max_size = partial(self._memory.max_batch_size, before=before)
        batches = cut_ragged(sequences.lengths, BATCH, self._sequences, max_size)
        library = llama.library()
        room = before + max(int(sequences.lengths[batch].sum()) for batch in batches)
        library.llama_memory_clear(library.llama_get_memory(self._context.fit(room)), False)
        if before:
            self._decode([sequences.prefix], 0, first=0, wanted=False)
        return in_order(batches, (self._score(sequences.take(batch)) for batch in batches))

    def _score(self, batch: Sequences) -> Logits:
        """Logits of a batch after the prefix, which is sequence 0; the batch's are 1, 2, ..."""
        library = llama.library()
        memory = library.llama_get_memory(self._context.fit(0))
        for owner in range(1, len(batch) + 1):
            library.llama_memory_seq_cp(memory, 0, owner, -1, -1)
        self._states.clear()
        self._decode(batch.ids, len(batch.prefix), first=1, wanted=True)
        for owner in range(1, len(batch) + 1):
            library.llama_memory_seq_rm(memory, owner, -1, -1)
        return np.concatenate(self._states).reshape(len(batch), -1) @ self._head

    def _decode(self, sequences: list[Ids], before: int, *, first: int, wanted: bool) -> None:
        """Decode sequences that start at a position; they are numbered from `first`.

        Args:
            sequences: token ids of each.
            before: position of each one's first token.
            first: number of the first sequence.
            wanted: whether to keep the last hidden state of each.
        """
        lengths = np.array([len(ids) for ids in sequences])
        ids = np.concatenate(sequences).astype(np.int32)
        outputs = np.zeros(len(ids), np.int8)
        if wanted:
            outputs[np.cumsum(lengths) - 1] = 1
        placed = llama.places(lengths, before, first)
        llama.run(llama.library().llama_decode, self._context.fit(0), ids, *placed, outputs)


def _looking(states: list[NDArray[np.float32]]) -> Callable[[int, bool, object], bool]:
    """llama.cpp's evaluation callback: asked which tensors to observe, then given their data.

    It refers to the list of states, not to the decoder, which would be a reference cycle.
    """
    ggml = llama.tensors()

    def look(tensor: int, asking: bool, _: object) -> bool:
        if asking:
            return bool(ggml.ggml_get_name(tensor) == _STATE)
        state = np.empty(ggml.ggml_nbytes(tensor) // 4, np.float32)
        ggml.ggml_backend_tensor_get(tensor, state.ctypes.data_as(ctypes.c_void_p), 0, state.nbytes)
        states.append(state)
        return True

    return look
