"""What qrank's graphs in MLX consist of: a file's weights, and the layers of a transformer.

MLX is lazy: everything here only builds a graph, which `qrank/backends/mlx.py` evaluates. So what
nobody reads is not computed, such as the last layer's attention while a prefix is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qrank.system.extras import need

FILE = "model.safetensors"
"""A variant's file."""

ABOUT = "qrank"
"""Key of the file's metadata: the graph's description, as JSON (docs/bundle.md)."""

EXACT = ("head.", "rotary")
"""Beginnings of the names of tensors that are fp32 whatever the graph computes in."""

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""MLX's names of compute dtypes."""

Array = Any
"""An `mlx.core.array`."""

KeysValues = tuple[Array, Array]
"""Of one layer; shape [batch, heads, length, width] each."""


def core() -> ModuleType:
    """The module mlx.core.

    Raises:
        MissingExtraError: it is not installed.
    """
    return need("mlx.core", extra="mlx")


class Weights:
    """A file's tensors by the modules of our graph: `words`, `layers.0.qkv`, `head.out`."""

    def __init__(self, path: Path, dtype: str, *, fused: bool) -> None:
        """Read a file's description; `load` reads its tensors.

        Args:
            path: the file.
            dtype: one of DTYPES, to compute in.
            fused: multiply with quantized weights as they are, as GPUs do best. If not, a matrix
                is expanded whenever it is used, which on a CPU takes less time than it saves.

        Raises:
            ValueError, KeyError: it is not a file of qrank's.
            OSError: there is no such file.
        """
        self._mx = core()
        self._path = path
        self._dtype = dtype
        self._fused = fused
        self.about = _description(path)
        self._quantized: Mapping[str, tuple[int, int]] = self.about["quantized"]
        self._tensors: dict[str, Array] = {}

    def load(self) -> Mapping[str, Array]:
        """The tensors, yet to be evaluated.

        Raises:
            RuntimeError, ValueError: MLX cannot read them.
        """
        mx = self._mx
        for name, tensor in mx.load(str(self._path)).items():
            if mx.issubdtype(tensor.dtype, mx.floating):
                kind = "fp32" if name.startswith(EXACT) else self._dtype
                tensor = tensor.astype(getattr(mx, DTYPES[kind]))
            self._tensors[name] = tensor
        return self._tensors

    def __contains__(self, module: str) -> bool:
        return f"{module}.weight" in self._tensors

    def tensor(self, name: str) -> Array:
        """A tensor that belongs to no module."""
        return self._tensors[name]

    def rows(self, module: str) -> float:
        """Rows of a table; infinite if there is no such table."""
        return len(self._tensors[f"{module}.weight"]) if module in self else math.inf

    def product(self, x: Array, module: str, rows: slice | None = None) -> Array:
        """x @ W.T + b.

        Args:
            x: shape [..., inputs].
            module: whose matrix has shape [outputs, inputs].
            rows: of the matrix; None: all.
        """

        def part(kind: str) -> Array:
            tensor = self._tensors[f"{module}.{kind}"]
            return tensor if rows is None else tensor[rows]

        if module not in self._quantized:
            out = self._plain(x, part("weight"))
        else:
            bits, group = self._quantized[module]
            matrix = part("weight"), part("scales"), part("biases")
            if self._fused:
                out = self._mx.quantized_matmul(
                    x, *matrix, transpose=True, group_size=group, bits=bits
                )
            else:
                expanded = self._mx.dequantize(*matrix, group_size=group, bits=bits)
                out = self._plain(x, expanded)
        return out + part("bias") if f"{module}.bias" in self._tensors else out

    def _plain(self, x: Array, weight: Array) -> Array:
        """x @ weight.T."""
        if self._fused:
            return x @ weight.T
        # In the order that MLX's BLAS on Linux, which is not optimized, multiplies best: up to 1.5
        # times as fast.
        rows = self._mx.contiguous(x.reshape(-1, x.shape[-1]).T)
        return (weight @ rows).T.reshape(*x.shape[:-1], len(weight))

    def lookup(self, ids: Array, module: str) -> Array:
        """Rows of a table, shape [*ids.shape, inputs]."""
        weight = self._tensors[f"{module}.weight"][ids]
        if module not in self._quantized:
            return weight
        bits, group = self._quantized[module]
        scales, biases = (self._tensors[f"{module}.{kind}"][ids] for kind in ("scales", "biases"))
        return self._mx.dequantize(weight, scales, biases, group_size=group, bits=bits)

    def norm(self, x: Array, module: str) -> Array:
        """x normalized over its last axis, by the kind of norm that the graph has."""
        weight, eps = self._tensors[f"{module}.weight"], self.about["eps"]
        if self.about["norm"] == "rms":
            return self._mx.fast.rms_norm(x, weight, eps)
        return self._mx.fast.layer_norm(x, weight, self._tensors.get(f"{module}.bias"), eps)


class Graph:
    """The layers that encoders and decoders have in common.

    Attributes:
        weights: of the file.
        about: the file's description.
        layers: how each layer differs: its `window`, and the name of its rotary frequencies.
    """

    def __init__(self, weights: Weights) -> None:
        self._mx = core()
        self.weights = weights
        self.about = weights.about
        self.layers: list[Mapping[str, Any]] = self.about["layers"]
        self._heads: int = self.about["heads"]
        self._key_heads: int = self.about["key_heads"]
        self._width: int = self.about["width"]

    def embedded(self, ids: Array) -> Array:
        """The words' embeddings, shape [batch, length, hidden]."""
        return self.weights.lookup(ids, "words") * self.about["embedding_scale"]

    def layer(
        self,
        hidden: Array,
        number: int,
        mask: Array | str | None,
        before: KeysValues | None = None,
        at: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """One layer.

        Args:
            hidden: shape [batch, length, hidden].
            number: of the layer, from 0 on.
            mask: what each token sees, as `mlx.core.fast.scaled_dot_product_attention` takes it.
            before: keys and values of a prefix, of batch size 1.
            at: the position in each sequence that the result is needed at; None: at all.

        Returns:
            The result, shape [batch, length or 1, hidden], and the keys and values without those
            of the prefix.
        """
        weights, name = self.weights, f"layers.{number}"
        kept = hidden if at is None else self.taken(hidden, at)
        if self.about["order"] == "post":
            added, new = self._attention(hidden, number, mask, before, at)
            kept = weights.norm(kept + added, f"{name}.attention_norm")
            return weights.norm(kept + self._feed_forward(kept, name), f"{name}.mlp_norm"), new
        # ModernBERT's first layer has no norm here.
        norm = f"{name}.attention_norm"
        even = weights.norm(hidden, norm) if norm in weights else hidden
        added, new = self._attention(even, number, mask, before, at)
        kept = kept + added
        even = weights.norm(kept, f"{name}.mlp_norm")
        return kept + self._feed_forward(even, name), new

    def taken(self, x: Array, at: Array) -> Array:
        """x at one position of each sequence, shape [batch, 1, hidden]."""
        return x[self._mx.arange(len(x)), at][:, None]

    def scored(self, pooled: Array) -> Array:
        """Logits, fp32 of shape [batch], of final states of shape [batch, hidden]."""
        weights, x = self.weights, pooled.astype(self._mx.float32)
        if "head.dense" in weights:
            x = _activation(self.about["head_activation"])(weights.product(x, "head.dense"))
        if "head.norm" in weights:
            x = weights.norm(x, "head.norm")
        return weights.product(x, "head.out")[:, 0]

    def _attention(
        self,
        x: Array,
        number: int,
        mask: Array | str | None,
        before: KeysValues | None,
        at: Array | None,
    ) -> tuple[Array, KeysValues]:
        mx, heads = self._mx, self._heads
        name, ends = f"layers.{number}", [heads, heads + self._key_heads]
        whole = heads + 2 * self._key_heads
        offset = 0 if before is None else before[0].shape[2]
        if at is None:
            queries, keys, values = mx.split(self._projected(x, name, 0, whole), ends, axis=1)
            places = offset
        else:
            queries = self._projected(self.taken(x, at), name, 0, heads)
            both = self._projected(x, name, heads, whole)
            keys, values = mx.split(both, [self._key_heads], axis=1)
            places = offset + at
        queries = self._placed(queries, number, "query_norm", places)
        keys = self._placed(keys, number, "key_norm", offset)
        new = keys, values
        if before is not None:
            keys, values = (
                mx.concatenate([mx.broadcast_to(old, (len(x), *old.shape[1:])), more], axis=2)
                for old, more in zip(before, new, strict=True)
            )
        mixed = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.about["scale"], mask=mask
        )
        joined = mixed.swapaxes(1, 2).reshape(len(x), -1, heads * self._width)
        return self.weights.product(joined, f"{name}.out"), new

    def _projected(self, x: Array, name: str, first: int, end: int) -> Array:
        """Some of a layer's heads of queries, then keys, then values.

        Returns:
            Shape [batch, end - first, length, width].
        """
        whole = (first, end) == (0, self._heads + 2 * self._key_heads)
        rows = None if whole else slice(first * self._width, end * self._width)
        found = self.weights.product(x, f"{name}.qkv", rows)
        return found.reshape(*x.shape[:2], -1, self._width).swapaxes(1, 2)

    def _placed(self, x: Array, number: int, norm: str, offset: Array | int) -> Array:
        """Queries or keys with their norm, if there is one, and their positions."""
        if (module := f"layers.{number}.{norm}") in self.weights:
            x = self.weights.norm(x, module)
        if (rotary := self.layers[number]["rotary"]) is None:
            return x
        return self._mx.fast.rope(
            x,
            self._width,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self.weights.tensor(rotary),
        )

    def _feed_forward(self, x: Array, name: str) -> Array:
        wide, act = self.weights.product(x, f"{name}.up"), _activation(self.about["activation"])
        if self.about["gated"]:
            first, second = self._mx.split(wide, 2, axis=-1)
            return self.weights.product(act(first) * second, f"{name}.down")
        return self.weights.product(act(wide), f"{name}.down")


def _description(path: Path) -> Mapping[str, Any]:
    """The description in a file's header.

    Raises:
        ValueError: qrank did not write the file, or it was cut off: MLX, which reads tensors in a
            thread of its own, would end the process.
        OSError: there is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 0 < length <= size - 8 else {}
    metadata = header.pop("__metadata__", {})
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if ABOUT not in metadata or size != 8 + length + end:
        raise ValueError("it is no file of qrank's, or is cut off")
    found: Mapping[str, Any] = json.loads(metadata[ABOUT])
    return found


def _activation(name: str) -> Callable[[Array], Array]:
    """An activation by the name that the file has for it."""
    mx = core()
    known: dict[str, Callable[[Array], Array]] = {
        "gelu": lambda x: x * (1 + mx.erf(x * math.sqrt(0.5))) / 2,
        "gelu_tanh": lambda x: (
            x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2
        ),
        "relu": lambda x: mx.maximum(x, 0),
        "silu": lambda x: x * mx.sigmoid(x),
        "tanh": mx.tanh,
    }
    return known[name]
