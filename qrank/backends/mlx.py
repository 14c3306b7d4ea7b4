"""Weights in groups of 8 or 4 bits on MLX: Apple's GPUs, and CPUs.

Graphs are qrank's own (`mlx_encoder.py`, `mlx_decoder.py`): mlx-lm has no encoders, scores no pairs
and shares no prefix between them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends.contract import BackendSpec, Format, Options, Precision
from qrank.backends.forks import waited_for
from qrank.backends.mlx_decoder import Decoder
from qrank.backends.mlx_encoder import Encoder
from qrank.backends.mlx_graph import FILE, KeysValues, Weights, core
from qrank.bundle.fidelity import EIGHT_BITS, FLOAT16, FOUR_BITS
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences, padded
from qrank.errors import TargetError
from qrank.scoring.batching import (
    CPU_BATCHES,
    DEVICE_BATCHES,
    cut,
    default_batch,
    in_halves,
    in_order,
    out_of_memory,
)

DEVICES = {"cpu": "cpu", "metal": "gpu"}
"""Our devices -> MLX's."""

_building = waited_for(threading.Lock())
"""MLX's default device is the process's, and building a graph sets it."""

_opened_in: list[int] = []
"""Process ids that opened a model; a forked child inherits the list."""


@dataclass(frozen=True, eq=False)
class _Lane:
    """A stream of MLX's, for which it has a thread, and the lock of who computes in it."""

    stream: Any
    computing: Any = field(default_factory=lambda: waited_for(threading.Lock()))


_idle: defaultdict[str, list[_Lane]] = defaultdict(list)
"""Device -> streams that nobody computes in. MLX never ends the thread of one, so all models share
them."""


def _evaluated(device: str, build: Callable[[], Any]) -> Any:
    """What a function returns that builds a graph; evaluated."""
    mx, idle = core(), _idle[device]
    with _building:
        new = None if idle else mx.new_thread_unsafe_stream(getattr(mx, DEVICES[device]))
        lane = idle.pop() if new is None else _Lane(new)
    try:
        with lane.computing:
            with _building, mx.stream(lane.stream):
                found = build()
            mx.eval(found)
    finally:
        idle.append(lane)
    return found


def version() -> str:
    """The runtime's name and version."""
    return f"mlx {core().__version__}"


def devices() -> list[str]:
    """Devices that this build of MLX finds here."""
    return ["cpu", *(["metal"] if core().metal.is_available() else [])]


def compute_dtypes(device: str) -> tuple[str, ...]:
    """Data types to compute in, fastest first; 16 bits gain nothing on the CPU."""
    return ("fp32",) if device == "cpu" else ("fp16", "bf16", "fp32")


def batches(device: str) -> tuple[int, ...]:
    """Padded tokens per batch that are worth trying, the default first."""
    return CPU_BATCHES if device == "cpu" else DEVICE_BATCHES


def memory(device: str) -> int | None:
    """Bytes that Metal recommends to use at most; None for other or absent devices."""
    if device == "cpu" or device not in devices():
        return None
    mx = core()
    size = mx.device_info(getattr(mx, DEVICES[device])).get("max_recommended_working_set_size")
    return None if size is None else int(size)


def patience(device: str) -> float:
    """MLX for Linux multiplies by a BLAS that is not optimized."""
    return 20.0 if device == "cpu" else 1.0


def product(a: Floats, b: Floats, device: str) -> Floats:
    """The matrix product, computed on a device."""
    mx = core()
    place = getattr(mx, DEVICES[device])
    return np.array(mx.matmul(mx.array(a), mx.array(b), stream=place))


def open(folder: Path, variant: Variant, device: str, options: Options) -> MlxBackend:
    """Load a variant's `model.safetensors`.

    Raises:
        MissingExtraError: mlx is not installed.
        TargetError: the device is absent, MLX cannot load the file, or this process was forked from
            one that opened a model.
    """
    if device not in (present := devices()):
        raise TargetError(
            f"{version()} here has no device {device!r}; present are: {', '.join(present)}"
        )
    if _opened_in and _opened_in[0] != os.getpid():
        # MLX reads files in threads that do not survive a fork, and Metal does not either.
        raise TargetError(
            "mlx cannot run in a process forked from one that had opened a model with it: make the "
            "Reranker after the fork (no --preload), or take another backend"
        )
    _opened_in.append(os.getpid())
    path = folder / variant.folder / FILE
    dtype = options.compute_dtype or "fp32"
    try:
        weights = Weights(path, dtype, fused=device != "cpu")
        _evaluated("cpu", weights.load)
        kind = Decoder if weights.about["graph"] == "decoder" else Encoder
        return MlxBackend(kind(weights), device, options)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise TargetError(f"mlx cannot load {path} on {device}: {error}") from error


class MlxBackend:
    """A graph, and the threads that run it: on the CPU, MLX computes a batch in one thread."""

    def __init__(self, graph: Encoder | Decoder, device: str, options: Options) -> None:
        self._mx = core()
        self._graph = graph
        self._device = device
        self._memory = options.memory
        self._parallel = options.threads if device == "cpu" else 1
        self._threads = ThreadPoolExecutor(self._parallel, "qrank-mlx")
        decoder = isinstance(graph, Decoder)
        self._batch = options.max_batch_tokens or default_batch(device, decoder)

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        if isinstance(self._graph, Encoder):
            sequences = sequences.whole()
        self._check(sequences)
        batches = cut(sequences, self._batch, self._memory, self._parallel)
        before = self._read(sequences)
        results = self._threads.map(
            lambda batch: in_halves(sequences.take(batch), lambda some: self._run(some, before)),
            batches,
        )
        logits = in_order(batches, results)
        if self._device != "cpu":
            # MLX keeps freed memory for each size it has seen.
            self._mx.clear_cache()
        return logits

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._threads.shutdown()
        del self._graph

    def _check(self, sequences: Sequences) -> None:
        """Refuse what lies outside of the graph's tables: MLX would read beyond them.

        Raises:
            TargetError: there is such a token.
        """
        asked: dict[str, Sequence[NDArray[Any]]] = {
            "words": [*sequences.ids, sequences.prefix],
            "types": sequences.segments or [],
            "positions": [np.array([sequences.lengths.max(initial=1) - 1])],
        }
        for table, numbers in asked.items():
            found, rows = np.concatenate([*numbers, [0]]), self._graph.weights.rows(table)
            if not 0 <= found.min() <= found.max() < rows:
                outside = found[(found < 0) | (found >= rows)][0]
                raise TargetError(
                    f"a token has number {outside:.0f} of the model's {table}; it has {rows}: the "
                    "bundle's tokenizer is another model's"
                )

    def _read(self, sequences: Sequences) -> list[KeysValues]:
        """The prefix's keys and values; empty if there is none."""
        if isinstance(self._graph, Encoder) or not len(sequences.prefix):
            return []
        graph = self._graph
        read: list[KeysValues] = in_halves(
            Sequences([sequences.prefix]),
            lambda prefix: self._compute(lambda: graph.read(self._mx.array(prefix.ids[0])[None])),
        )
        return read

    def _run(self, batch: Sequences, before: list[KeysValues]) -> Logits:
        with self._memory.reserve(len(batch), int(batch.lengths.max()), len(batch.prefix)):
            return np.array(self._compute(lambda: self._built(batch, before)), np.float32)

    def _built(self, batch: Sequences, before: list[KeysValues]) -> Any:
        """The graph of a batch's logits."""
        array, int32 = self._mx.array, np.int32
        inputs = padded(batch)
        ids, lengths = array(inputs["input_ids"].astype(int32)), array(batch.lengths.astype(int32))
        if isinstance(self._graph, Decoder):
            return self._graph(ids, lengths, before)
        types = inputs.get("token_type_ids")
        return self._graph(ids, lengths, None if types is None else array(types.astype(int32)))

    def _compute(self, build: Callable[[], Any]) -> Any:
        """Build a graph and evaluate it.

        Raises:
            MemoryError: memory does not suffice.
            TargetError: MLX fails.
        """
        try:
            return _evaluated(self._device, build)
        except (RuntimeError, ValueError, KeyError) as error:
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise TargetError(f"mlx failed on {self._device}: {error}") from error


SPEC = BackendSpec(
    runtime="MLX",
    open=open,
    version=version,
    devices=devices,
    kinds=tuple(DEVICES),
    modules=("mlx.core",),
    extra="mlx",
    format=Format(
        precisions=(
            # Last on CPUs: MLX multiplies there 30 times as slowly as the others on Linux.
            Precision("int8", EIGHT_BITS, cpu=15, elsewhere=2),
            Precision("fp16", FLOAT16, bytes=2, cpu=16, elsewhere=1),
            Precision("int4", FOUR_BITS, bytes=0.6, cpu=17, elsewhere=9),
        ),
        converter="qrank.converters.mlx.export",
        unasked=sys.platform == "darwin",
    ),
    compute_dtypes=compute_dtypes,
    batches=batches,
    memory=memory,
    product=product,
    patience=patience,
)
