"""A backend's input: token ids, no text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.errors import TargetError

Ids = NDArray[np.int32]
"""Token ids of one sequence, shape [length]."""

Segments = NDArray[np.int8]
"""Token types of one sequence, shape [length]."""

Logits = NDArray[np.float32]
"""One raw relevance logit per sequence, shape [n]."""


Floats = NDArray[np.float32]
"""A matrix."""


@dataclass(frozen=True)
class Sequences:
    """Sequences to score, in any order and of any length.

    Attributes:
        ids: token ids, ragged and unpadded, special tokens included.
        segments: token types alongside `ids`; None for families without them.
        prefix: token ids that every sequence starts with, not repeated in `ids`; for causal models,
            which need to read them only once.
    """

    ids: list[Ids]
    segments: list[Segments] | None = None
    prefix: Ids = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, shape [n]."""
        return np.fromiter((len(s) for s in self.ids), np.int64, len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: NDArray[np.intp]) -> Sequences:
        """The sequences at `indices`, in that order."""
        segments = self.segments
        return Sequences(
            [self.ids[i] for i in indices],
            None if segments is None else [segments[i] for i in indices],
            self.prefix,
        )

    def whole(self) -> Sequences:
        """The same sequences with the prefix repeated in each."""
        if not len(self.prefix):
            return self
        return Sequences([np.concatenate((self.prefix, s)) for s in self.ids])


def padded(sequences: Sequences, length: int | None = None) -> dict[str, NDArray[np.int64]]:
    """The inputs that scoring graphs may take, by name.

    `input_ids`, `attention_mask` and, with segments, `token_type_ids` have shape [n, length]. Ids
    and types are padded with 0; the mask is 1 for tokens and 0 for padding. `last`, of shape [n],
    is the index of each sequence's last token.

    Args:
        sequences: to score.
        length: to pad to; None: the longest sequence's.
    """
    lengths = sequences.lengths
    mask = (np.arange(length or lengths.max()) < lengths[:, None]).astype(np.int64)
    inputs = {
        "input_ids": _filled(sequences.ids, mask.shape),
        "attention_mask": mask,
        "last": lengths - 1,
    }
    if sequences.segments is not None:
        inputs["token_type_ids"] = _filled(sequences.segments, mask.shape)
    return inputs


def feed(
    names: Iterable[str],
    sequences: Sequences,
    length: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Select a graph's inputs by name, in its order, from `padded` and more inputs.

    Raises:
        TargetError: the graph needs an input that is not there.
    """
    inputs, wanted = {**padded(sequences, length), **(more or {})}, list(names)
    if missing := [name for name in wanted if name not in inputs]:
        raise TargetError(f"the graph wants {', '.join(missing)}; the family has none")
    return {name: inputs[name] for name in wanted}


def no_prefix(shape: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Inputs of a decoder's graph without a prefix to continue from, and without one to keep.

    Args:
        shape: of the graph's input `prefix`; its fourth dimension, the length, is ignored.
    """
    layers, two, heads, _, width = shape
    return {
        "prefix": np.zeros((layers, two, heads, 0, width), np.float32),
        "keep": np.empty(0, np.int64),
    }


def read_prefix(
    prefix: Ids,
    bare: dict[str, NDArray[Any]],
    present: Callable[[Sequences, dict[str, NDArray[Any]]], NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """A prefix's KV cache, as a decoder's graph takes it with every batch.

    Args:
        prefix: may be empty.
        bare: from `no_prefix`; empty for an encoder's graph.
        present: runs the graph on sequences and more inputs and returns its output `present`.
    """
    if not len(prefix):
        return bare
    keep = np.arange(len(prefix))
    return {**bare, "prefix": present(Sequences([prefix]), {**bare, "keep": keep})}


def _filled(rows: Sequence[NDArray[np.signedinteger]], shape: tuple[int, ...]) -> NDArray[np.int64]:
    out = np.zeros(shape, np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
