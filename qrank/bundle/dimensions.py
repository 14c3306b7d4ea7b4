"""Model dimensions that determine how much memory batches take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FLOAT = 4
"""Bytes per number in fp32, the widest data type that batches are computed in."""


LIVE_LAYERS = 0.4
"""Share of a causal model's layers whose activations OpenVINO holds at once: with 28 layers of
Qwen3-0.6B's size, they took 0.87 MB per token. For encoders, it is one layer."""


@dataclass(frozen=True)
class Dimensions:
    """Model dimensions that determine how much memory batches take.

    Attributes:
        live_layers: layers whose activations are in memory at once.
        hidden: hidden size: numbers per token between layers.
        intermediate: numbers per token inside a layer's feed-forward block.
        heads: number of attention heads.
        key_heads: number of key and value heads; fewer than `heads` if several heads share one.
        width: numbers per token in one head.
    """

    live_layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    width: int

    @classmethod
    def of(cls, config: Mapping[str, Any], decoder: bool) -> Dimensions:
        """Read the dimensions from a transformers config.json."""
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
        """Read from a manifest, which calls `live_layers` by its old name, `held`."""
        others = dict(content)
        return cls(live_layers=others.pop("held"), **others)

    def to_json(self) -> dict[str, int]:
        """The dimensions as the manifest stores them."""
        others = asdict(self)
        return {"held": others.pop("live_layers"), **others}

    def estimate_bytes(self, length: int, before: int = 0) -> int:
        """Estimate the bytes that one sequence of a batch takes.

        Args:
            length: number of tokens, padding included.
            before: tokens of the shared prefix, whose keys and values each sequence attends to.
        """
        seen = before + length
        states = 6 * self.hidden + 3 * self.intermediate
        states += 2 * (self.heads + self.key_heads) * self.width
        scores = 2 * self.heads * seen * length
        keys = 2 * self.heads * self.width * seen
        return _FLOAT * (self.live_layers * states * length + scores + keys)
