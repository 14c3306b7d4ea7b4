"""A family: how one kind of checkpoint is read, filled in for one checkpoint.

The bundle's manifest holds it, so scoring needs neither the checkpoint nor the card
(`qrank.converters.checkpoint.card`).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from qrank.errors import InputError

ACTIVATIONS = ("identity", "sigmoid")

POOLINGS = ("pooler", "cls", "mean", "last", "step")
"""How final hidden states become one vector. `last`, the last token's, means a decoder family;
`step`, that of the decoder's first step, an encoder-decoder."""

_SLOT = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Family:
    """A card filled in for one checkpoint.

    Attributes:
        name: the card's name.
        architecture: the transformers class that is the reference.
        template: the prompt: token ids, and texts with slots, each tokenized separately.
        segments: the token type of each template item; None if there are no token types.
        max_length: maximum number of tokens, special tokens included.
        pooling: how the final hidden states become one vector: one of POOLINGS.
        activation: turns logits into scores: one of ACTIVATIONS.
        temperature: divides the logits before the activation.
        instruction: the default for `{instruction}`; "" if the template has no such slot.
        instructed: the template with an instruction, if it differs; otherwise None.
        labels: token ids that a language model is scored by: the logit of the first minus that of
            the second, if there is one. Empty for models with a score head.
        classes: of a score head with two labels, the number of the one that means relevant and of
            the other: the logit of the first minus that of the second. Empty for one label.
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
    classes: tuple[int, ...] = ()

    @property
    def decoder(self) -> bool:
        """Whether it is a causal model: everything before the documents is computed once."""
        return self.pooling == "last"

    @property
    def pair(self) -> bool:
        """Whether the model reads a query and a document as they are, between special tokens."""
        texts = [item for item in self.template if isinstance(item, str)]
        return texts == ["{query}", "{document}"] and self.pooling not in ("last", "step")

    @property
    def takes_instruction(self) -> bool:
        """Whether its template has a place for an instruction."""
        return bool(self.instruction) or self.instructed is not None

    def asked(self, instruction: str | None) -> tuple[tuple[int | str, ...], str]:
        """The template for an instruction, and the instruction's text; None means the default.

        Raises:
            InputError: the family takes no instruction.
        """
        if instruction is None:
            return self.template, self.instruction
        if self.instructed is not None:
            return self.instructed, instruction
        if not self.takes_instruction:
            raise InputError(f"models of family {self.name} take no instruction")
        return self.template, instruction

    def to_json(self) -> dict[str, Any]:
        """The family as the manifest stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Family:
        """The inverse of `to_json`."""
        tuples = {key: tuple(v) for key, v in content.items() if isinstance(v, list)}
        return cls(**{**content, **tuples})


def slots(item: str) -> list[str]:
    """The names in braces in a template item, in order."""
    return _SLOT.findall(item)


def fill(item: str, **texts: str) -> str:
    """A template's text item with its slots filled; slots in the filled-in texts are left alone."""
    return _SLOT.sub(lambda found: texts.get(found[1], found[0]), item)


def label_row(rows: Any) -> Any:
    """Combine the rows of labels into the score: the first minus the second, if any.

    Args:
        rows: an array or tensor of shape [labels, ...]: rows of the output matrix, or logits.

    Returns:
        An array or tensor of shape [...].
    """
    return rows[0] - rows[1:].sum(0)
