"""What a backend sees: integers, no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
"""Token ids of one sequence, shape [length]."""

Segments = NDArray[np.int8]
"""Token types of one sequence, shape [length]."""

Logits = NDArray[np.float32]
"""One raw relevance number a sequence, shape [n]."""


@dataclass(frozen=True)
class Work:
    """Sequences to score, in any order and of any length.

    Attributes:
        sequences: token ids, ragged and unpadded, special tokens included.
        segments: token types alongside `sequences`; None for families without them.
    """

    sequences: list[Ids]
    segments: list[Segments] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, shape [n]."""
        return np.fromiter((len(s) for s in self.sequences), np.int64, len(self.sequences))

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, indices: NDArray[np.intp]) -> Work:
        """The sequences at `indices`, in that order."""
        segments = self.segments
        return Work(
            [self.sequences[i] for i in indices],
            None if segments is None else [segments[i] for i in indices],
        )


def padded(work: Work) -> list[NDArray[np.int64]]:
    """Token ids, mask and, where there are any, token types; each of shape [n, longest].

    Ids and types are filled up with 0, which the mask, 1 where a token is, hides.
    """
    lengths = work.lengths
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = _filled(work.sequences, mask.shape)
    return [ids, mask, *([] if work.segments is None else [_filled(work.segments, mask.shape)])]


def _filled(rows: Sequence[NDArray[np.signedinteger]], shape: tuple[int, ...]) -> NDArray[np.int64]:
    out = np.zeros(shape, np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
