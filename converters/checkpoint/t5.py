"""What exporting transformers' T5 needs: buckets of distances from a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def exportable(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    """Make a T5's buckets of distances exact in every data type; other models are left alone.

    It computes them in floating point, by logarithms: in fp16 or bf16, a distance may get another
    bucket. The graph looks them up in a table that transformers' own function made in fp32.

    Args:
        model: transformers' own model.
        max_length: tokens that the graph reads.
    """
    # Its first layer has the embeddings of the buckets, for all layers.
    modules = [part for part in model.modules() if hasattr(part, "_relative_position_bucket")]
    attentions: list[Any] = [part for part in modules if part.has_relative_attention_bias]
    if not attentions:
        yield
        return
    kind = type(attentions[0])
    distances = torch.arange(1 - max_length, max_length)
    tables = {
        attention: attention._relative_position_bucket(
            distances,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        for attention in attentions
    }

    def bias_of(self: Any, queries: int, keys: int, *_: Any, **__: Any) -> Any:
        """The bias of each key's distance to each query, [1, heads, queries, keys]."""
        places = torch.arange(keys)[None] - torch.arange(queries)[:, None] + (max_length - 1)
        found = self.relative_attention_bias(tables[self][places])
        return found.permute(2, 0, 1)[None]

    original = kind.compute_bias
    kind.compute_bias = bias_of
    try:
        yield
    finally:
        kind.compute_bias = original
