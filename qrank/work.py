"""What a backend sees: integers, no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qrank.errors import TargetError

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


def padded(work: Work, length: int | None = None) -> dict[str, NDArray[np.int64]]:
    """A scoring graph's inputs by name, in the order it takes them; each of shape [n, length].

    Ids and types are filled up with 0, which the mask, 1 where a token is, hides.

    Args:
        work: what to score.
        length: None: the longest sequence's.
    """
    lengths = work.lengths
    mask = (np.arange(length or lengths.max()) < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": _filled(work.sequences, mask.shape), "attention_mask": mask}
    if work.segments is not None:
        inputs["token_type_ids"] = _filled(work.segments, mask.shape)
    return inputs


def feed(
    names: Iterable[str], work: Work, length: int | None = None
) -> dict[str, NDArray[np.int64]]:
    """`padded`, as a graph with inputs of these names takes it.

    Raises:
        TargetError: the graph wants an input the work does not have.
    """
    inputs, wanted = padded(work, length), list(names)
    if missing := [name for name in wanted if name not in inputs]:
        raise TargetError(f"the graph wants {', '.join(missing)}; the family has none")
    return {name: inputs[name] for name in wanted}


def _filled(rows: Sequence[NDArray[np.signedinteger]], shape: tuple[int, ...]) -> NDArray[np.int64]:
    out = np.zeros(shape, np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
