"""Inputs and outputs of prebuilt graphs by name: the same in ONNX and OpenVINO."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qrank.bundle.family import Family
from qrank.converters.checkpoint.configuration import read_config
from qrank.converters.checkpoint.read import Checkpoint
from qrank.errors import ConversionError

IDS, MASK, TYPES, POSITIONS = "input_ids", "attention_mask", "token_type_ids", "position_ids"

BEAMS = "beam_idx"
"""The KV cache row that each sequence continues: an input of OpenVINO's stateful graphs."""

SQUASHED = ("Sigmoid", "Softmax", "LogSoftmax")
"""Operations that may already have been applied to the logits; same names in both formats."""

_CACHE = re.compile(r"(?:past_key_values?|past|present)\.(\d+)\.(key|value)")

_TYPES = {
    "int4": ("u4", "i4", "nf4", "UINT4", "INT4"),
    "int8": ("u8", "i8", "UINT8", "INT8"),
    "fp16": ("f16", "FLOAT16"),
    "bf16": ("bf16", "BFLOAT16"),
}
"""Data types that a precision's weights are stored in, the coarsest first."""

_SHARE = 0.1
"""Minimum share of the weights in a precision's types: quantized graphs keep other types too."""

LARGE = 2**10
"""Minimum number of elements for a constant to count as a weight."""

WHOLE_PROMPTS = "the graph keeps no keys and values: a prompt is read anew with every document"
"""The note for a causal model's graph that cannot share a prefix."""


def precision_of(numbers: Mapping[str, int]) -> str:
    """A graph's precision, given the number of weight elements stored in each data type."""
    total = sum(numbers.values())
    for precision, types in _TYPES.items():
        if total and sum(numbers.get(t, 0) for t in types) >= _SHARE * total:
            return precision
    return "fp32"


def cache_place(name: str) -> tuple[int, int] | None:
    """The layer of a KV cache tensor and 0 for keys, 1 for values; None for other names."""
    found = _CACHE.match(name)
    return (int(found[1]), int(found[2] == "value")) if found else None


def check_inputs(names: Iterable[str], family: Family) -> None:
    """Check that all inputs of a graph are known and none is missing.

    Raises:
        ConversionError: an input is unknown or missing; with the names.
    """
    found = set(names)
    known = {IDS, MASK, POSITIONS} | (set() if family.decoder else {TYPES})
    caches: set[str] = set()
    # Graphs that include pooling have no KV cache to continue from.
    if family.labels:
        known |= {BEAMS}
        caches = {name for name in found if cache_place(name) is not None}
    if strange := sorted(found - known - caches):
        more = ", past_key_values.N.key and .value" if family.labels else ""
        raise ConversionError(
            f"the graph takes {', '.join(strange)}, which is not understood; known are: "
            f"{', '.join(sorted(known))}{more}"
        )
    needed = {IDS, MASK} | (set() if family.segments is None else {TYPES})
    if missing := sorted(needed - found):
        raise ConversionError(
            f"the graph takes {', '.join(sorted(found))}; family {family.name} needs "
            f"{', '.join(missing)} too, without which it would score wrongly: "
            "convert the checkpoint itself"
        )


def gives_vocabulary(shape: Sequence[int | None], family: Family) -> bool:
    """Whether a graph's output is the logits of the whole vocabulary, not one logit per pair.

    Args:
        shape: shape of the output; None for a dynamic dimension.
        family: the model's family.

    Raises:
        ConversionError: the output does not match the family.
    """
    if family.labels:
        if len(shape) == 3 and shape[2] is not None and shape[2] > max(family.labels):
            return True
        raise ConversionError(
            f"the graph gives logits of shape {shown(shape)}; family {family.name} compares tokens "
            f"{', '.join(map(str, family.labels))} of a vocabulary: [batch, length, vocabulary] "
            "was expected"
        )
    if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
        return False
    raise ConversionError(
        f"the graph gives logits of shape {shown(shape)}; one logit a pair, [batch, 1], was "
        "expected: it is a classifier, or a model without a score head"
    )


def cache_shape(
    past: Mapping[tuple[int, int], Any], present: Mapping[tuple[int, int], Any]
) -> tuple[int, int, int]:
    """Layers, heads and width of a KV cache with tensors of shape [batch, heads, length, width].

    Args:
        past: `cache_place` -> shape of the cache tensor read; None for a dynamic dimension.
        present: the same for the cache tensors returned; their shapes are not checked.

    Raises:
        ConversionError: a tensor is missing, or its shape differs from the others.
    """
    layers = max(layer for layer, _ in past) + 1
    wanted = {(layer, kind) for layer in range(layers) for kind in (0, 1)}
    shapes = {tuple(shape[1::2]) for shape in past.values() if len(shape) == 4}
    (heads, width) = next(iter(shapes), (None, None))
    odd = len(shapes) != 1 or any(len(shape) != 4 for shape in past.values())
    if odd or heads is None or width is None or not set(past) == set(present) == wanted:
        found = sorted({shown(shape) for shape in past.values()})
        raise ConversionError(
            f"the graph's cache of {len(past)} tensors ({', '.join(found)}) is not understood; "
            "keys and values of every layer, read and given, of one size [batch, heads, length, "
            "width], were expected"
        )
    return layers, heads, width


def shown(shape: Sequence[int | None]) -> str:
    """A shape as readable text: `[?, ?, 1200]`."""
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def first_position(checkpoint: Checkpoint) -> int:
    """The position id of an encoder's first token."""
    if not checkpoint.card.positions_after_pad:
        return 0
    return int(read_config(checkpoint.folder)["pad_token_id"]) + 1


def padding(checkpoint: Checkpoint) -> int:
    """The token id that a graph recognizes as padding.

    Raises:
        ConversionError: the configuration names no pad_token_id.
    """
    number = read_config(checkpoint.folder).get("pad_token_id")
    if number is None:
        raise ConversionError(
            "config.json names no pad_token_id, by which such a graph finds the last token"
        )
    return int(number)


def not_understood(what: str) -> ConversionError:
    """The error to raise if the score head is not found; `what` is what was found instead."""
    return ConversionError(
        f"the graph's logits come out of {what}, where a product with the output matrix was "
        "expected: its head cannot be cut. Convert the checkpoint itself"
    )
