"""A checkpoint that is read as another class, by renaming and exact arithmetic on its weights.

Nothing is written: the other class's config.json and the places of its weights are used instead of
the files. Each kind of rewriting has a file of its own; `tests/test_rewriting.py` compares each
with the original computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.stored import Weight

WeightMap = Mapping[str, Weight]
"""Name of a weight in the class -> the weight."""


@dataclass(frozen=True)
class Rewriting:
    """How a checkpoint is read as another class.

    Attributes:
        what: what the checkpoint is, for people; "" if it is read as it is.
        config: config.json of the class that it is read as.
        files: finds the safetensors files that hold its weights. Raises FamilyError if there are
            none.
        weights: the weights of that class, given these files.
        family: the card that reads it; None: the one that matches the configuration.
    """

    what: str
    config: dict[str, Any]
    files: Callable[[], list[Path]]
    weights: Callable[[list[Path]], WeightMap]
    family: str | None = None

    @property
    def about(self) -> str:
        """What is read as which class; "" if it is read as it is."""
        return self.what and f"{self.what} read as {self.config['architectures'][0]}"
