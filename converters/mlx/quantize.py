"""Matrices in MLX's affine quantization: groups of a row share a scale and a bias.

A weight is integer * scale + bias, which is minus a whole number of scales. Scales and biases are
fp16; integers lie in 32-bit words, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Floats
from qrank.converters.four_bits import four_bits, group_of, packed

GROUPS = (64, 32)
"""Weights that share a scale in 8 bits, the preferred number first."""

_ZERO = 128
"""The integer that means 0, in 8 bits."""

Tensors = dict[str, NDArray[np.generic]]
"""`weight`, uint32 [rows, width * bits / 32]; `scales` and `biases`, fp16 [rows, groups]."""


def group(width: int, bits: int) -> int | None:
    """Weights per group in rows of a width; None if they do not fit."""
    if bits == 4:
        return group_of(width)
    return next((size for size in GROUPS if width % size == 0), None)


def quantized(pieces: Iterable[Floats], bits: int) -> Tensors:
    """A matrix whose rows fit a group.

    Args:
        pieces: its rows, some at a time, shape [n, width].
        bits: 8 or 4.
    """
    found = [_four(rows) if bits == 4 else _eight(rows) for rows in pieces]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def _eight(rows: Floats) -> Tensors:
    size = group(rows.shape[1], 8)
    assert size is not None
    groups = rows.reshape(len(rows), -1, size)
    # Symmetric, so that 0 stays exactly 0. Rows of what is added to the residual sum have few large
    # weights among many small ones, whose offset would add up over all activations: with the
    # smallest weight as the bias, the Kendall tau of `mini` to its original was 0.89.
    exact = np.abs(groups).max(axis=2) / np.float32(127)
    scales = exact.astype(np.float16)
    # Below 2^-14, fp16 has so few numbers that the largest weights could be cut.
    short = scales < exact * np.float32(1 - 2**-10)
    scales = np.where(short | (scales == 0), np.nextafter(scales, np.float16(np.inf)), scales)
    steps = np.rint(groups / scales.astype(np.float32)[..., None])
    integers = (np.clip(steps, -_ZERO, 127) + _ZERO).astype(np.uint8)
    return {"weight": _words(integers), "scales": scales, "biases": scales * np.float16(-_ZERO)}


def _four(rows: Floats) -> Tensors:
    found = four_bits(rows)
    assert found is not None
    biases = -(found.zeros.astype(np.float32) * found.scales)
    return {
        "weight": _words(packed(found.integers)),
        "scales": found.scales.astype(np.float16),
        "biases": biases.astype(np.float16),
    }


def _words(integers: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Bytes of shape [rows, groups, n] as little-endian words, shape [rows, groups * n / 4]."""
    flat = np.ascontiguousarray(integers.reshape(len(integers), -1))
    return flat.view("<u4").astype(np.uint32, copy=False)
