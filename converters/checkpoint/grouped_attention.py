"""Attention of causal models in exported graphs: heads that share keys are rows of one product.

transformers repeats the keys and values for each of these heads. A runtime copies them to do so,
which took a quarter of the time in OpenVINO (Qwen3-Reranker-0.6B's size, short documents).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "qrank_grouped"


@contextmanager
def exportable(model: PreTrainedModel) -> Iterator[None]:
    """Let a causal model compute attention without repeated keys and values.

    Args:
        model: transformers' own model; its masks are added to the scores.
    """
    config: Any = model.config
    original = config._attn_implementation
    repeated: dict[int, torch.Tensor] = {}

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        scaling: float,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """As transformers' eager attention, of the same arguments: [batch, length, heads, width].

        Args:
            module: the layer's attention.
            query: [batch, heads, length, width].
            key: [batch, key heads, seen, width].
            value: as `key`.
            attention_mask: [1, 1, length, seen], the same tensor in all layers of a kind.
            scaling: multiplies the scores.
        """
        batch, heads, length, width = query.shape
        sharing = heads // key.shape[1]
        rows = (query * scaling).reshape(batch, key.shape[1], sharing * length, width)
        # Once for all layers: the caller keeps the mask, so that no other tensor gets its id.
        if id(attention_mask) not in repeated:
            repeated[id(attention_mask)] = attention_mask.repeat(1, 1, sharing, 1)
        scores = rows @ key.transpose(2, 3) + repeated[id(attention_mask)]
        scores = torch.softmax(scores, -1, dtype=torch.float32)
        found = (scores.to(value.dtype) @ value).reshape(batch, heads, length, width)
        return found.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = original
        del ALL_ATTENTION_FUNCTIONS[_NAME]
