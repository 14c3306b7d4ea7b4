"""A family: how one kind of checkpoint is read, made concrete for one checkpoint.

The manifest of a bundle holds it, so that nothing of the checkpoint or of the card
(`qrank.converters.checkpoint.card`) is needed to score.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from qrank.errors import InputError

ACTIVATIONS = ("identity", "sigmoid")

POOLINGS = ("pooler", "cls", "mean", "last")
"""How final hidden states become one vector. `last`, the last token's, makes a decoder family."""

_SLOT = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Family:
    """A card made concrete for one checkpoint.

    Attributes:
        name: the card's name.
        architecture: the transformers class that is the reference.
        template: the prompt: token ids, and texts with slots, each tokenized by itself.
        segments: the token type of each template item; None without token types.
        max_length: tokens the model reads, special tokens included.
        pooling: how the final hidden states become one vector: one of POOLINGS.
        activation: what scores go through.
        temperature: what logits are divided by before that.
        instruction: the default for `{instruction}`; "" where the template has none.
        instructed: the template with an instruction, where it is another; None elsewhere.
        labels: token ids of a causal language model's score: the logit of the first, less that of
            the second, if there is one. Empty for models with a score head.
    """

    name: str
    architecture: str
    template: tuple[int | str, ...]
    segments: tuple[int, ...] | None
    max_length: int
    pooling: str
    activation: str
    temperature: float = 1.0
    instruction: str = ""
    instructed: tuple[int | str, ...] | None = None
    labels: tuple[int, ...] = ()

    @property
    def decoder(self) -> bool:
        """Whether it is a causal model: all that stands before the documents is computed once."""
        return self.pooling == "last"

    def asked(self, instruction: str | None) -> tuple[tuple[int | str, ...], str]:
        """The template for an instruction, None being the default, and what stands in it.

        Raises:
            InputError: the family has no place for an instruction.
        """
        if instruction is None:
            return self.template, self.instruction
        if self.instructed is not None:
            return self.instructed, instruction
        if not self.instruction:
            raise InputError(f"models of family {self.name} take no instruction")
        return self.template, instruction

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Family:
        """The inverse of `to_json`."""
        tuples = {key: tuple(v) for key, v in content.items() if isinstance(v, list)}
        return cls(**{**content, **tuples})


def slots(item: str) -> list[str]:
    """The names in braces of a template's item, in their order."""
    return _SLOT.findall(item)


def fill(item: str, **texts: str) -> str:
    """A template's text item with texts in its slots; what they hold is not looked at."""
    return _SLOT.sub(lambda found: texts.get(found[1], found[0]), item)


def label_row(rows: Any) -> Any:
    """What a decoder scores by, of what belongs to its labels: the first, less the second if any.

    Args:
        rows: an array or a tensor of shape [labels, ...]: rows of the output matrix, or logits.

    Returns:
        The same of shape [...].
    """
    return rows[0] - rows[1:].sum(0)
