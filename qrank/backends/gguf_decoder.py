"""Causal models on llama.cpp: the prefix is read once, the head is exact.

llama.cpp has no way to score by a head of ours, and gives hidden states only in a mode that
computes the whole vocabulary for every token. So the last hidden state is taken out of its graph
as it is computed, for the last tokens alone, and the head applied here in fp32.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qrank.backends import Options, llama
from qrank.batching import cut_ragged, in_order
from qrank.work import Ids, Logits, Work

HEAD = "head.npy"
"""The score's row, float32 [hidden]: a file beside the model's."""

BATCH = 2048
"""Tokens a batch of several sequences."""

PHYSICAL_BATCH = 512
"""Tokens llama.cpp computes at once, of which it keeps all intermediate results."""

_STATE = b"result_norm"
"""llama.cpp's name of the hidden states behind the last norm, of the tokens that are asked for."""

_GROWTH = 1024
"""A context is made for a multiple of so many tokens."""


class GgufDecoder:
    """A model and its one context, on a thread of its own, batch by batch."""

    def __init__(
        self, model: object, head: NDArray[np.float32], sequences: int, options: Options
    ) -> None:
        """Take over a model.

        Args:
            model: of `llama.load`.
            head: the score's row, float32 [hidden].
            sequences: that a batch may have.
            options: threads that llama.cpp computes on, and memory for batches.
        """
        self._model = model
        self._head = head
        self._sequences = sequences
        self._threads = options.threads
        self._memory = options.memory
        self._size = 0
        self._pointer: object = None
        self._states: list[NDArray[np.float32]] = []
        callback = llama.library().ggml_backend_sched_eval_callback
        self._callback = callback(self._look)
        # Never the caller's thread, see `qrank.backends.gguf.GgufBackend`; and one call at a time.
        self._worker = ThreadPoolExecutor(1, "qrank-gguf")

    def logits(self, work: Work) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        return self._worker.submit(self._run, work).result()

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._worker.shutdown()
        self._free()
        llama.library().llama_model_free(self._model)

    def _run(self, work: Work) -> Logits:
        before = len(work.prefix)
        most = partial(self._memory.most, before=before)
        batches = cut_ragged(work.lengths, BATCH, self._sequences, most)
        self._fit(before + max(int(work.lengths[batch].sum()) for batch in batches))
        memory = llama.library().llama_get_memory(self._pointer)
        llama.library().llama_memory_clear(memory, False)
        if before:
            self._decode([work.prefix], 0, first=0, wanted=False)
        return in_order(batches, (self._score(work.take(batch), memory) for batch in batches))

    def _score(self, batch: Work, memory: object) -> Logits:
        """Logits of sequences behind the prefix, which is sequence 0; the batch's are 1, 2, ..."""
        library = llama.library()
        for owner in range(1, len(batch) + 1):
            library.llama_memory_seq_cp(memory, 0, owner, -1, -1)
        self._states.clear()
        self._decode(batch.sequences, len(batch.prefix), first=1, wanted=True)
        for owner in range(1, len(batch) + 1):
            library.llama_memory_seq_rm(memory, owner, -1, -1)
        return np.concatenate(self._states).reshape(len(batch), -1) @ self._head

    def _decode(self, sequences: list[Ids], before: int, *, first: int, wanted: bool) -> None:
        """Read sequences that begin at a position; numbered from `first`.

        Args:
            sequences: token ids of each.
            before: their first token's position.
            first: the first one's number.
            wanted: whether to look at each one's last state.
        """
        lengths = np.array([len(ids) for ids in sequences])
        ids = np.concatenate(sequences).astype(np.int32)
        outputs = np.zeros(len(ids), np.int8)
        if wanted:
            outputs[np.cumsum(lengths) - 1] = 1
        placed = llama.places(lengths, before, first)
        llama.run(llama.library().llama_decode, self._pointer, ids, *placed, outputs)

    def _look(self, tensor: int, asking: bool, _: object) -> bool:
        """llama.cpp asks about each result whether it is to be seen, and then shows it."""
        ggml = llama.tensors()
        if asking:
            return bool(ggml.ggml_get_name(tensor) == _STATE)
        state = np.empty(ggml.ggml_nbytes(tensor) // 4, np.float32)
        ggml.ggml_backend_tensor_get(tensor, state.ctypes.data_as(ctypes.c_void_p), 0, state.nbytes)
        self._states.append(state)
        return True

    def _fit(self, tokens: int) -> None:
        """Make room for the prefix and a batch."""
        if self._pointer and tokens <= self._size:
            return
        self._free()
        self._size = -(-tokens // _GROWTH) * _GROWTH
        self._pointer = llama.new_context(
            self._model,
            self._size,
            self._sequences + 1,
            n_ubatch=min(self._size, PHYSICAL_BATCH),
            n_threads=self._threads,
            n_threads_batch=self._threads,
            cb_eval=self._callback,
        )

    def _free(self) -> None:
        if self._pointer:
            llama.library().llama_free(self._pointer)
        self._pointer = None
