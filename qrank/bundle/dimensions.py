"""What decides how much memory a model's batches take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FLOAT = 4
"""Bytes of a number in fp32: what batches are computed in, at most."""


LIVE_LAYERS = 0.4
"""The share of a causal model's layers whose numbers OpenVINO holds at once: 28 of Qwen3-0.6B's
size took 0.87 MB a token. Of encoders, one layer's."""


@dataclass(frozen=True)
class Dimensions:
    """What decides how much memory a model's batches take.

    Attributes:
        live_layers: layers whose numbers live at once.
        hidden: numbers a token is between layers.
        intermediate: numbers it is inside a layer's feed-forward part.
        heads: of attention.
        key_heads: of its keys and values; fewer than `heads` where several share one.
        width: of a head.
    """

    live_layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    width: int

    @classmethod
    def of(cls, config: Mapping[str, Any], decoder: bool) -> Dimensions:
        """Read a config.json of transformers."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            live_layers=math.ceil(LIVE_LAYERS * config["num_hidden_layers"]) if decoder else 1,
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            key_heads=config.get("num_key_value_heads") or heads,
            width=config.get("head_dim") or hidden // heads,
        )

    @classmethod
    def from_json(cls, content: Mapping[str, int]) -> Dimensions:
        """Of a manifest, which calls `live_layers` by their first name, `held`."""
        others = dict(content)
        return cls(live_layers=others.pop("held"), **others)

    def to_json(self) -> dict[str, int]:
        """For a manifest."""
        others = asdict(self)
        return {"held": others.pop("live_layers"), **others}

    def estimate_bytes(self, length: int, before: int = 0) -> int:
        """Bytes that a sequence of a batch takes, about.

        Args:
            length: its tokens, padding included.
            before: tokens of the shared prefix, whose keys and values each sequence sees.
        """
        seen = before + length
        states = 6 * self.hidden + 3 * self.intermediate
        states += 2 * (self.heads + self.key_heads) * self.width
        scores = 2 * self.heads * seen * length
        keys = 2 * self.heads * self.width * seen
        return _FLOAT * (self.live_layers * states * length + scores + keys)
