"""What other programs read beside a model's graph, kept from the checkpoint for `qrank export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about itself beyond what scoring with qrank needs.

    Attributes:
        config: config.json of the class that the model is read as.
        added_tokens: those of its tokenizer.json. The bundle's own tokenizer lacks the control
            tokens among them.
        special: control tokens by role: `{"cls": "[CLS]", "pad": "[PAD]"}`.
        card: language and licence, as keys and values of its model card.
    """

    config: dict[str, Any]
    added_tokens: list[dict[str, Any]]
    special: dict[str, str]
    card: dict[str, Any]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Description:
        """Read from a manifest.

        Raises:
            TypeError, ValueError: it is no description.
        """
        found = cls(**content)
        tokens = found.added_tokens
        if not (
            isinstance(found.config, dict)
            and isinstance(found.card, dict)
            and all(type(t["id"]) is int and isinstance(t["content"], str) for t in tokens)
            and all(isinstance(token, str) for token in found.special.values())
        ):
            raise ValueError("description has values of other types than expected")
        return found
