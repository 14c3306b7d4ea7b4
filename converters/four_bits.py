"""Matrices as 4-bit integers, for every format whose numbers qrank computes itself.

A few neighbouring weights of a row, a group, share a scale and a zero point. Per group, the range
that gives the smallest squared error is chosen: the largest weight may be cut off, if the others
gain more by finer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Floats

_GROUP, _WIDE = 32, 1024
"""Weights per group; twice as many in rows of this width: larger models lose less."""

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a group's range that are tried."""

_ROWS = 2**22
"""Number of weights handled at once: the search takes several times their memory."""

_TINIEST = np.float16(2**-24)
"""The smallest positive fp16: scales are stored in it."""


@dataclass(frozen=True)
class FourBits:
    """A matrix of n rows as (integers - zeros) * scales.

    Attributes:
        integers: 0 to 15, uint8 of shape [n, groups, weights per group].
        zeros: 0 to 15, uint8 of shape [n, groups].
        scales: representable in fp16, float32 of shape [n, groups].
    """

    integers: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: Floats


def group_of(width: int) -> int | None:
    """Weights per group in rows of a width; None if they do not fit: they stay at 8 bits."""
    group = 2 * _GROUP if width >= _WIDE else _GROUP
    return next((size for size in (group, _GROUP) if width % size == 0), None)


def four_bits(rows: Floats) -> FourBits | None:
    """Quantize a matrix row by row; None if its rows do not fit any group.

    Args:
        rows: shape [n, width], one row per output.
    """
    group = group_of(rows.shape[1])
    if group is None:
        return None
    step = max(_ROWS // rows.shape[1], 1)
    pieces = [rows[i : i + step].reshape(-1, group) for i in range(0, len(rows), step)]
    found = [np.concatenate(parts) for parts in zip(*map(_best, pieces), strict=True)]
    integers, zeros, scales = found
    return FourBits(
        integers.reshape(len(rows), -1, group),
        zeros.reshape(len(rows), -1),
        scales.reshape(len(rows), -1),
    )


def packed(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two neighbours of the last axis in one byte, the first in the low half; 0 if one is alone."""
    if integers.shape[-1] % 2:
        integers = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, 1)])
    high: NDArray[np.uint8] = integers[..., 1::2] << np.uint8(4)
    both: NDArray[np.uint8] = integers[..., ::2] | high
    return both


def _best(groups: Floats) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Floats]:
    """Integers, zeros and scales of groups, shape [n, group]: those of the smallest error."""
    low = np.minimum(groups.min(axis=1, keepdims=True), 0)
    high = np.maximum(groups.max(axis=1, keepdims=True), 0)
    best = None
    for share in _SHARES:
        scale = ((high - low) * np.float32(share / 15)).astype(np.float16)
        scale = np.maximum(scale, _TINIEST).astype(np.float32)
        zero = np.clip(np.rint(-low * np.float32(share) / scale), 0, 15)
        whole = np.clip(np.rint(groups / scale) + zero, 0, 15)
        error = np.square((whole - zero) * scale - groups).sum(axis=1, keepdims=True)
        tried = [whole.astype(np.uint8), zero.astype(np.uint8), scale, error]
        if best is None:
            best = tried
            continue
        better = (error < best[3])[:, 0]
        for kept, new in zip(best, tried, strict=True):
            kept[better] = new[better]
    assert best is not None
    return best[0], best[1][:, 0], best[2][:, 0]
