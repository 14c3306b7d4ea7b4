"""What exporting transformers' DeBERTa-v2 needs: plain functions, and positions from a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def exportable(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    """Make a DeBERTa-v2 exportable for a while; other models are left alone.

    - Its functions compiled by TorchScript, which torch.export cannot trace, are replaced by the
      functions that they were compiled from.
    - It computes buckets of distances in floating point, by logarithms: in fp16 or bf16, a distance
      may get another bucket. The graph looks them up in a table that transformers' own function
      made in fp32.

    Args:
        model: transformers' own model.
        max_length: tokens that the graph reads.
    """
    if model.config.model_type != "deberta-v2":
        yield
        return
    from transformers.models.deberta_v2 import modeling_deberta_v2 as module

    compiled: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, torch.jit.ScriptFunction)
    }
    original: Any = module.build_relative_position
    encoder, states = model.deberta.encoder, torch.empty(max_length, 1)
    square = original(states, states, encoder.position_buckets, encoder.max_relative_positions)[0]
    # The bucket of every distance from 1 - max_length to max_length - 1.
    buckets = torch.cat([square[0].flip(0), square[1:, 0]])

    def from_table(query_layer: Any, key_layer: Any, *sizes: int, **named: int) -> Any:
        places = [
            torch.arange(layer.size(-2), dtype=torch.long) for layer in (query_layer, key_layer)
        ]
        distances = places[0][:, None] - places[1][None, :]
        return buckets[distances + (max_length - 1)].unsqueeze(0)

    try:
        for name, function in compiled.items():
            setattr(module, name, function._torchdynamo_inline)
        module.build_relative_position = from_table
        yield
    finally:
        for name, function in compiled.items():
            setattr(module, name, function)
        module.build_relative_position = original
