"""A compiled OpenVINO graph fed by parallel streams: lengths, batches, the shared prefix."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends.mapped import dropping_pages
from qrank.bundle.sequences import Logits, Sequences, feed, no_prefix, read_prefix
from qrank.errors import TargetError
from qrank.scoring.batching import cut, in_order, rounded_length
from qrank.scoring.memory import MemoryBudget

if TYPE_CHECKING:
    import openvino

STEP = 16
"""Lengths are rounded up to a multiple of this. OpenVINO builds kernels for each new shape: with
fewer shapes, documents of uneven length ran a third faster; the padding costs 3 %."""


class _Stream(threading.local):
    """Thread-local state of one stream: a request serves only one thread at a time."""

    def __init__(self) -> None:
        self.requests: dict[int | None, openvino.InferRequest] = {}


class OpenvinoBackend:
    """A compiled graph fed by parallel streams; with static shapes, one graph per length."""

    def __init__(
        self,
        compiled: Callable[[int | None], openvino.CompiledModel],
        limit: int,
        batch: int | None,
        weights: Path,
        memory: MemoryBudget,
        *,
        spread: bool = False,
    ) -> None:
        """Compile.

        Args:
            compiled: compiles the graph for one pair of a length; given None, for any shape.
            limit: maximum number of tokens the model reads.
            batch: padded tokens per batch. None: static shapes, one pair at a time.
            weights: the file that holds them.
            memory: budget for batches.
            spread: cut a request so that all streams have as much to do, as on the CPU.
        """
        self._compile = compiled
        self._limit = limit
        self._batch = batch
        self._weights = weights
        self._arranged: set[int | None] = set()
        self._memory = memory
        self._lock = threading.Lock()
        self._models: dict[int | None, openvino.CompiledModel] = {}
        model = self._model(None if batch else rounded_length(1, limit))
        shapes = {i.any_name: i.partial_shape for i in model.inputs}
        self._inputs = list(shapes)
        # Empty if the graph has no `prefix` input.
        self._bare: dict[str, NDArray[Any]] = {}
        if "prefix" in shapes:
            self._bare = no_prefix(
                [0 if d.is_dynamic else d.get_length() for d in shapes["prefix"]]
            )
        streams: int = model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._parallel = streams if spread else 1
        self._streams = ThreadPoolExecutor(streams, "qrank-openvino")
        self._stream = _Stream()

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        if not self._batch or not self._bare:
            sequences = sequences.whole()
        batches = cut(sequences, self._batch or 0, self._memory, self._parallel)
        present = partial(self._call, "present")
        prefix = self._streams.submit(read_prefix, sequences.prefix, self._bare, present).result()
        results = self._streams.map(lambda batch: self._run(sequences.take(batch), prefix), batches)
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._streams.shutdown()
        self._models.clear()

    def _run(self, batch: Sequences, prefix: dict[str, NDArray[Any]]) -> Logits:
        length = self._length(int(batch.lengths.max()))
        with self._memory.reserve(len(batch), length, len(batch.prefix)):
            logits = self._call("logits", batch, prefix)
        return logits.astype(np.float32).reshape(len(batch))

    def _call(self, output: str, batch: Sequences, more: dict[str, NDArray[Any]]) -> NDArray[Any]:
        length = self._length(int(batch.lengths.max()))
        inputs = feed(self._inputs, batch, length, more)
        graph = None if self._batch else length
        # A graph's weights are repacked for the device when it first runs.
        once = nullcontext() if graph in self._arranged else dropping_pages(self._weights)
        try:
            with once:
                request = self._request(graph)
                # A copy, as the next batch reuses the request's memory.
                found = np.array(request.infer(inputs, share_inputs=True)[output])
            self._arranged.add(graph)
            return found
        except RuntimeError as error:
            raise TargetError(f"openvino failed: {error}") from error

    def _length(self, longest: int) -> int:
        """The length to pad a batch to, given its longest sequence."""
        if self._batch:
            return min(-(-longest // STEP) * STEP, self._limit)
        return rounded_length(longest, self._limit)

    def _request(self, length: int | None) -> openvino.InferRequest:
        """This stream's own inference request for a graph."""
        requests = self._stream.requests
        if length not in requests:
            requests[length] = self._model(length).create_infer_request()
        return requests[length]

    def _model(self, length: int | None) -> openvino.CompiledModel:
        with self._lock:
            if length not in self._models:
                self._models[length] = self._compile(length)
            return self._models[length]
