"""Logits -> scores, applied once, in float64; ranks and ties are decided on logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Logits

Scores = NDArray[np.float64]
"""Relevance of each pair after the family's activation, shape [n]."""


def _identity(x: Scores) -> Scores:
    return x


def _sigmoid(x: Scores) -> Scores:
    # exp of non-positive numbers only: no overflow, and no loss of precision near 0.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


_FUNCTIONS = {"identity": _identity, "sigmoid": _sigmoid}


def activate(logits: Logits | Scores, activation: str, temperature: float = 1.0) -> Scores:
    """Apply one of `qrank.bundle.family.ACTIVATIONS` to logits / temperature."""
    return _FUNCTIONS[activation](logits.astype(np.float64) / temperature)
