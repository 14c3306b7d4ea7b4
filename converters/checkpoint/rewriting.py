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
from qrank.errors import FamilyError

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


ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
"""The keys of config.json that give a classifier one label."""


def brings(config: Mapping[str, Any], name: str) -> bool:
    """Whether a repository brings code of its own (`auto_map`) with a class of this name."""
    code = config.get("auto_map")
    return isinstance(code, dict) and any(name in str(value) for value in code.values())


def check_keys(
    config: Mapping[str, Any], expected: Mapping[str, Any], what: str, source: str
) -> None:
    """Check that keys of config.json, if present, have the values that a class computes.

    Args:
        config: the checkpoint's config.json.
        expected: the values by key.
        what: what is read, in errors.
        source: the checkpoint's name in errors.

    Raises:
        FamilyError: a key has another value.
    """
    for key, value in expected.items():
        if (found := config.get(key, value)) != value:
            raise FamilyError(
                f"{source}: config.json has {key} = {found!r}; qrank reads {what} with {value!r} "
                "alone"
            )
