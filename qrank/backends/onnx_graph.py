"""Sessions of onnxruntime fed by parallel streams: lengths, batches, the shared prefix."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.bundle.sequences import Logits, Sequences, feed, no_prefix, read_prefix
from qrank.errors import TargetError
from qrank.scoring.batching import (
    cut,
    cut_padded,
    in_halves,
    in_order,
    out_of_memory,
    rounded_length,
    rounded_up,
)
from qrank.scoring.memory import MemoryBudget

if TYPE_CHECKING:
    import onnxruntime

Shape = tuple[int, int]
"""Rows of a batch, and tokens of each."""


class OnnxBackend:
    """A graph fed by parallel streams: of small batches on the CPU, of large ones elsewhere."""

    def __init__(
        self,
        opened: Callable[[Shape | None], onnxruntime.InferenceSession],
        *,
        batch: int,
        streams: int,
        memory: MemoryBudget,
        limit: int | None = None,
        holder: tuple[str, int] | None = None,
    ) -> None:
        """Open the first session.

        Args:
            opened: opens one for batches of up to so many rows of so many tokens; given None, for
                batches of any shape.
            batch: padded tokens per batch.
            streams: how many batches run at once.
            memory: budget for batches.
            limit: maximum number of tokens the model reads, to run few shapes: rows are rounded up
                to a power of two, and lengths by `rounded_length`. None: batches of any shape.
            holder: the device that keeps a prefix's keys and values, by onnxruntime's name and its
                number. None: they are held in memory, like all inputs.
        """
        self._open = opened
        self._batch = batch
        self._memory = memory
        self._limit = limit
        self._holder = holder
        self._lock = threading.Lock()
        self._sessions: dict[int | None, onnxruntime.InferenceSession] = {}
        session = self._session(None if limit is None else rounded_length(1, limit))
        shapes = {i.name: i.shape for i in session.get_inputs()}
        self._names = list(shapes)
        # Empty if the graph has no `prefix` input.
        self._bare = no_prefix(shapes["prefix"]) if "prefix" in shapes else {}
        self._parallel = streams
        self._streams = ThreadPoolExecutor(streams, "qrank-onnx")

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        if not self._bare or self._limit:
            sequences = sequences.whole()
        if self._limit:
            lengths = [self._length(length) for length in sequences.lengths]
            batches = cut_padded(lengths, self._batch, self._memory.max_batch_size)
        else:
            batches = cut(sequences, self._batch, self._memory, self._parallel)
        prefix = read_prefix(sequences.prefix, self._bare, partial(self._call, "present"))
        if len(batches) == 1:
            results = [self._run(sequences.take(batches[0]), prefix)]
        else:
            results = list(
                self._streams.map(lambda b: self._run(sequences.take(b), prefix), batches)
            )
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._streams.shutdown()
        self._sessions.clear()
        del self._open

    def _run(self, batch: Sequences, prefix: dict[str, Any]) -> Logits:
        rows, length = self._shape(batch)
        with self._memory.reserve(rows, length, len(batch.prefix)):
            logits = self._call("logits", batch, prefix)
        return np.asarray(logits, np.float32).reshape(len(batch))

    def _call(self, output: str, batch: Sequences, more: dict[str, Any]) -> Any:
        return in_halves(batch, lambda some: self._compute(output, some, more))

    def _compute(self, output: str, batch: Sequences, more: dict[str, Any]) -> Any:
        rows, length = self._shape(batch)
        # Rows that only round up repeat others.
        whole = batch if rows == len(batch) else batch.take(np.resize(np.arange(len(batch)), rows))
        inputs = feed(self._names, whole, length, more)
        session = self._session(length if self._limit else None)
        try:
            if self._holder is None:
                (found,) = session.run([output], inputs)
                return np.asarray(found)[: len(batch)] if self._limit else np.asarray(found)
            return self._bound(session, output, inputs)
        except Exception as error:  # onnxruntime's own exceptions share no base
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise TargetError(f"onnxruntime failed: {error}") from error

    def _bound(
        self, session: onnxruntime.InferenceSession, output: str, inputs: dict[str, Any]
    ) -> Any:
        """Run a causal model; a prefix's keys and values stay on the device between batches."""
        assert self._holder is not None
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        stays = output == "present"
        binding.bind_output(output, *(self._holder if stays else ("cpu", 0)))
        session.run_with_iobinding(binding)
        (found,) = binding.get_outputs()
        return found if stays else found.numpy()

    def _session(self, length: int | None) -> onnxruntime.InferenceSession:
        """The session for batches of this many tokens; for None, of any shape."""
        with self._lock:
            if length not in self._sessions:
                shape = None if length is None else (self._most(length), length)
                self._sessions[length] = self._open(shape)
            return self._sessions[length]

    def _shape(self, batch: Sequences) -> Shape:
        """The rows and tokens that a batch is padded to."""
        longest = int(batch.lengths.max())
        if not self._limit:
            return len(batch), longest
        length = self._length(longest)
        return min(rounded_up(len(batch)), max(self._most(length), len(batch))), length

    def _length(self, longest: int) -> int:
        assert self._limit is not None
        return rounded_length(longest, self._limit)

    def _most(self, length: int) -> int:
        """The most rows of a length that a batch has."""
        most = max(self._batch // length, 1)
        return min(most, self._memory.max_batch_size(length) or most)
