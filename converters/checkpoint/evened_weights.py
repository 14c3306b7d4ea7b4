"""A checkpoint's weights as converters write them: evened out, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrank.bundle.family import Family, label_row
from qrank.bundle.sequences import Floats
from qrank.converters.checkpoint.configuration import NEMOTRON
from qrank.converters.checkpoint.evening import Scaling
from qrank.converters.checkpoint.weights import read_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Weights:
    """A checkpoint's weights, read some rows at a time and evened out."""

    def __init__(self, folder: Path, scalings: Mapping[str, Scaling]) -> None:
        # Before 2019, layer norms called their parameters gamma and beta.
        old = {"gamma": "weight", "beta": "bias"}
        self._found = {}
        for stored, part in read_weights(folder).items():
            module, _, parameter = stored.rpartition(".")
            self._found[f"{module}.{old.get(parameter, parameter)}"] = part
        self._scalings = scalings
        self.shapes = {name: list(part.shape) for name, part in self._found.items()}

    def row(self, name: str, number: int) -> Floats:
        """One row of a weight."""
        return self._found[name].row(number)

    def rows(self, name: str, first: int = 0) -> Iterator[Floats]:
        """The rows of a weight from `first` on, in pieces."""
        for rows in self._found[name].rows(first):
            yield self._scalings[name].apply(rows, first) if name in self._scalings else rows
            first += len(rows)


def score_head(weights: Weights, config: PretrainedConfig, family: Family) -> Floats:
    """The row that maps a pooled hidden state to its logit, from the files; float32 [hidden]."""
    if not family.labels:
        row = weights.row("score.weight", 0)
        return row / np.float32(config.temperature) if config.model_type == NEMOTRON else row
    head: Floats = label_row(label_rows(weights, config, family))
    return head


def label_rows(weights: Weights, config: PretrainedConfig, family: Family) -> Floats:
    """The labels' rows of the output matrix, shape [labels, hidden]."""
    tied = config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return np.stack([weights.row(name, label) for label in family.labels])
