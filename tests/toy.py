"""A backend with its own format in one file: BERT in plain numpy.

This is all that another package needs: SPEC, named by an entry point in the group
"qrank.backends", and a converter, which is also this module. See `test_toy.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qrank.backends import BackendSpec, Format, Options, Precision
from qrank.bundle.fidelity import FLOAT16, FLOAT32
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences

if TYPE_CHECKING:
    from qrank.converters.checkpoint.read import Checkpoint

# The converter


MODULES = ("torch", "transformers", "safetensors")
"""Modules that converting needs."""

MEMORY = 0.0
"""Minimum memory for converting, as a multiple of the model's size; not measured."""


def disk(number: float) -> float:
    """Disk space per weight during conversion, given its `number` of bytes afterwards."""
    return number


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write the weights."""
    model = checkpoint.load()
    stored = np.float16 if precision == "fp16" else np.float32
    weights = {name: tensor.numpy().astype(stored) for name, tensor in model.state_dict().items()}
    about = [model.config.num_attention_heads, model.config.layer_norm_eps]
    np.savez(folder / "model.npz", about=about, **weights)
    return ""


# The backend


class Bert:
    """BERT, one sequence at a time."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self._weights = {name: file[name].astype(np.float32) for name in file.files}
            heads, self._eps = file["about"].tolist()
        self._heads = int(heads)
        self._layers = sum(name.endswith("attention.self.query.bias") for name in self._weights)

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend`."""
        types: Sequence[NDArray[np.integer]] = sequences.segments or [
            np.zeros(len(ids), np.int8) for ids in sequences.ids
        ]
        found = [self._logit(*each) for each in zip(sequences.ids, types, strict=True)]
        return np.array(found, np.float32)

    def close(self) -> None:
        """See `qrank.backends.Backend`."""

    def _logit(self, ids: NDArray[np.integer], types: NDArray[np.integer]) -> float:
        place, weights = "bert.embeddings", self._weights
        x = weights[f"{place}.word_embeddings.weight"][ids]
        x = x + weights[f"{place}.position_embeddings.weight"][: len(ids)]
        x = x + weights[f"{place}.token_type_embeddings.weight"][types]
        x = self._norm(x, f"{place}.LayerNorm")
        for layer in range(self._layers):
            x = self._layer(x, f"bert.encoder.layer.{layer}")
        pooled = np.tanh(self._dense(x[:1], "bert.pooler.dense"))
        return float(self._dense(pooled, "classifier")[0, 0])

    def _layer(self, x: Floats, place: str) -> Floats:
        query, key, value = (
            self._dense(x, f"{place}.attention.self.{name}")
            .reshape(len(x), self._heads, -1)
            .transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        seen = (shares @ value).transpose(1, 0, 2).reshape(len(x), -1)
        seen = self._dense(seen, f"{place}.attention.output.dense")
        x = self._norm(x + seen, f"{place}.attention.output.LayerNorm")
        inner = _gelu(self._dense(x, f"{place}.intermediate.dense"))
        return self._norm(
            x + self._dense(inner, f"{place}.output.dense"), f"{place}.output.LayerNorm"
        )

    def _dense(self, x: Floats, name: str) -> Floats:
        found: Floats = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return found

    def _norm(self, x: Floats, name: str) -> Floats:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._eps)
        found: Floats = x * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return found


def _gelu(x: Floats) -> Floats:
    # erf from Abramowitz and Stegun, 7.1.26, accurate to 1.5e-7: numpy has no erf.
    z = np.abs(x) / np.float32(math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.polyval([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0], t)
    found: Floats = (x * (1 + np.sign(x) * (1 - series * np.exp(-z * z))) / 2).astype(np.float32)
    return found


def open(folder: Path, variant: Variant, device: str, options: Options) -> Bert:
    """Load a variant's weights."""
    return Bert(folder / variant.name / "model.npz")


SPEC = BackendSpec(
    open=open,
    version=lambda: f"numpy {np.__version__}",
    devices=lambda: ["cpu"],
    format=Format(
        precisions=(
            Precision("fp32", FLOAT32, bytes=4, cpu=20),
            Precision("fp16", FLOAT16, bytes=2, cpu=21),
        ),
        converter="toy",
    ),
    product=lambda a, b, device: a @ b,
    note=lambda device: "slowly",
)
