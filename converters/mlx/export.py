"""A checkpoint -> a safetensors file of weights that qrank's graphs in MLX score with.

Names and shapes are those of our graphs, whatever the checkpoint's class; the file's metadata
describes the graph. Matrices are quantized without their activations, in groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends.mlx_graph import ABOUT, FILE
from qrank.bundle.family import Family, label_row
from qrank.bundle.sequences import Floats, Sequences
from qrank.converters.checkpoint import evening
from qrank.converters.checkpoint.configuration import auto_class, make_settings, read_config
from qrank.converters.checkpoint.evened_weights import Weights, score_head
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.mlx.layouts import Layout, activation
from qrank.converters.mlx.quantize import group, quantized
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODULES = ("torch", "transformers", "safetensors", "mlx.core")
"""Modules needed to convert and verify."""

MEMORY = 0.6
"""The minimum memory for converting, as a multiple of the size in fp32: of int8, which is written
from memory; the original's matrices take 0.5."""

_BITS: Mapping[str, Mapping[str, int]] = {
    "fp16": {},
    "int8": dict.fromkeys(("words", "projection", "qkv", "out", "up", "down"), 8),
    # As in the other formats, the words and what is added to the residual sum keep 8 bits.
    "int4": {"words": 8, "projection": 8, "qkv": 4, "out": 8, "up": 4, "down": 8},
}
"""Precision -> bits of quantized matrices, by the last part of our module's name."""


def disk(number: float) -> float:
    """Disk bytes per weight during conversion, given `number` bytes afterwards: only those."""
    return number


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.safetensors` into a folder.

    Args:
        checkpoint: read from its folder, some rows at a time.
        precision: one of the format's `made` precisions. The score head is always fp32.
        folder: exists and is empty.
        calibration: pairs whose activations the channels are evened out by, but for fp16.

    Returns:
        A note on matrices whose rows do not fit a group; or "".

    Raises:
        ConversionError: our graphs do not compute the model.
    """
    torch = need("torch")
    layout = Layout.of(checkpoint.family.architecture)
    config = make_settings(read_config(checkpoint.folder))
    with torch.device("meta"):
        model = auto_class(config.to_dict()).from_config(config, trust_remote_code=False)
    rotary = _rotary(model, config, layout)
    about = _about(checkpoint, config, layout, rotary)
    evened = {} if precision == "fp16" else evening.scalings(checkpoint, calibration)
    weights = Weights(checkpoint.folder, evened)
    file = _File(precision)
    for module, end, names in _found(model, layout, config, checkpoint.folder, weights):
        pieces = _pieces(weights, names, module, layout, config, checkpoint.family)
        file.add(module, end, weights.shapes[names[0]], pieces)
    if layout.language_model:
        file.tensors["head.out.weight"] = score_head(weights, config, checkpoint.family)[None]
    file.tensors |= {name: frequencies for name, (frequencies, _) in rotary.items()}
    metadata = {"format": "mlx", ABOUT: json.dumps({**about, "quantized": file.quantized})}
    need("safetensors.numpy").save_file(file.tensors, folder / FILE, metadata)
    return file.note


class _File:
    """What a file holds.

    Attributes:
        tensors: by name.
        quantized: module -> bits and weights per group.
    """

    def __init__(self, precision: str) -> None:
        self.tensors: dict[str, NDArray[np.generic]] = {}
        self.quantized: dict[str, tuple[int, int]] = {}
        self._bits = _BITS[precision]
        self._unfit: list[int] = []

    def add(self, module: str, end: str, shape: Sequence[int], pieces: Iterator[Floats]) -> None:
        """Add a module's weight or bias.

        Args:
            module: ours.
            end: `weight` or `bias`.
            shape: of the first of the checkpoint's that it consists of.
            pieces: rows, some at a time.
        """
        matrix = len(shape) == 2 and not module.startswith("head.")
        bits = self._bits.get(module.rpartition(".")[2]) if matrix else None
        size = group(shape[1], bits) if bits else None
        if bits and size:
            made = quantized(pieces, bits)
            self.tensors |= {f"{module}.{kind}": values for kind, values in made.items()}
            self.quantized[module] = bits, size
            return
        if bits:
            self._unfit.append(shape[1])
        plain = np.concatenate(list(pieces)).astype(np.float16 if matrix else np.float32)
        self.tensors[f"{module}.{end}"] = plain

    @property
    def note(self) -> str:
        """A note on matrices whose rows do not fit a group; or ""."""
        if not self._unfit:
            return ""
        widths = ", ".join(map(str, sorted(set(self._unfit))))
        count = len(self._unfit) + len(self.quantized)
        return f"rows of {widths} do not fit 32: {len(self._unfit)} of {count} matrices stay fp16"


def _about(
    checkpoint: Checkpoint, config: PretrainedConfig, layout: Layout, rotary: Mapping[str, Any]
) -> dict[str, Any]:
    """The file's description (docs/bundle.md), without its quantized matrices.

    Raises:
        ConversionError: our graphs do not compute what the configuration says.
    """
    heads, causal = config.num_attention_heads, checkpoint.family.decoder
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = checkpoint.window if causal else getattr(config, "sliding_window", None)
    factors = {factor for _, factor in rotary.values()} or {1.0}
    if len(factors) > 1:
        raise ConversionError(
            "config.json scales rotary positions (rope_parameters) by factors that differ between "
            "layers; qrank's MLX graphs have one"
        )
    pooling = checkpoint.family.pooling
    return {
        "graph": "decoder" if causal else "encoder",
        "order": "pre" if layout.pre else "post",
        "norm": "rms" if layout.language_model else "layer",
        "eps": getattr(config, layout.eps) if isinstance(layout.eps, str) else layout.eps,
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or heads,
        "width": width,
        "scale": width**-0.5 * factors.pop() ** 2,
        "activation": activation(layout.activation, config),
        "gated": layout.gated,
        "embedding_scale": config.hidden_size**0.5 if layout.scaled_embeddings else 1.0,
        "pooling": pooling if pooling in ("mean", "last") else "first",
        "head_activation": activation(layout.head_activation, config),
        "layers": [
            {
                "window": window if kind == "sliding_attention" else None,
                "rotary": next(
                    (name for name in (f"rotary.{kind}", "rotary") if name in rotary), None
                ),
            }
            for kind in kinds
        ],
    }


def _rotary(
    model: PreTrainedModel, config: PretrainedConfig, layout: Layout
) -> dict[str, tuple[Floats, float]]:
    """Rotary frequencies as MLX takes them, 1 / frequency, and the factor of cosine and sine.

    Returns:
        One entry, `rotary`, or one for each kind of layers.
    """
    if not layout.rotary:
        return {}
    if config.model_type == "gte":
        from qrank.converters.checkpoint.gte_class import frequencies

        return {"rotary": (np.asarray(1 / frequencies(config).numpy(), np.float32), 1.0)}
    # transformers' own, on the CPU: the model has no numbers.
    made = type(model.base_model.rotary_emb)(config)
    found = {}
    for name, values in made.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            kind = name.removesuffix("inv_freq").rstrip("_")
            factor = getattr(made, name.replace("inv_freq", "attention_scaling"))
            place = ".".join(filter(None, ("rotary", kind)))
            found[place] = ((1 / values).numpy().astype(np.float32), float(factor))
    return found


def _found(
    model: PreTrainedModel,
    layout: Layout,
    config: PretrainedConfig,
    folder: Path,
    weights: Weights,
) -> Iterator[tuple[str, str, list[str]]]:
    """Our parameters that the model has: a module, `weight` or `bias`, and its own names.

    Raises:
        ConversionError: the model has a parameter that our graph has no place for, or the
            checkpoint lacks one.
    """
    left = {name for name, _ in model.named_parameters()}
    if layout.language_model:
        left = {name for name in left if not name.startswith(("lm_head.", "score."))}
    if missing := sorted(left - weights.shapes.keys()):
        raise ConversionError(f"{folder} has no weight {missing[0]}")
    found = []
    for module, theirs in layout.places(config.num_hidden_layers):
        for end in ("weight", "bias"):
            names = [f"{name}.{end}" for name in theirs]
            if left.issuperset(names):
                left -= set(names)
                found.append((module, end, names))
    if left:
        raise ConversionError(f"qrank's MLX graph has no place for: {', '.join(sorted(left)[:3])}")
    yield from found


def _pieces(
    weights: Weights,
    names: list[str],
    module: str,
    layout: Layout,
    config: PretrainedConfig,
    family: Family,
) -> Iterator[Floats]:
    """The rows of our module's parameter, some at a time."""
    if module == "head.out" and family.classes:
        rows = np.concatenate(list(weights.rows(names[0])))
        yield label_row(rows[list(family.classes)])[None]
        return
    first = config.pad_token_id + 1 if layout.after_pad and module == "positions" else 0
    norm = layout.norms_minus_one and (module == "final" or module.endswith("_norm"))
    for name in names:
        for rows in weights.rows(name, first):
            yield rows + 1 if norm else rows
