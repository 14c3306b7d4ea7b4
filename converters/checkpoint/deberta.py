"""What exporting transformers' DeBERTa-v2 needs: plain functions, and positions from tables."""

from __future__ import annotations

import math
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
    - It scores every token with the embeddings of all buckets, copies these for every pair, and
      picks one score per pair of tokens. The graph scores with those of the distances that occur,
      and shifts the rows. The projected embeddings are a table of the graph, one row per bucket,
      which quantizes like any other.

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
    positions: Any = module.build_relative_position
    attention: Any = module.DisentangledSelfAttention
    bias = attention.disentangled_attention_bias
    encoder, states = model.deberta.encoder, torch.empty(max_length, 1)
    square = positions(states, states, encoder.position_buckets, encoder.max_relative_positions)[0]
    # The bucket of every distance from max_length - 1 down to 1 - max_length.
    buckets = torch.cat([square[0].flip(0), square[1:, 0]]).flip(0)

    def no_positions(query_layer: Any, key_layer: Any, *sizes: int, **named: int) -> Any:
        return torch.zeros(1, 1, 1, dtype=torch.long)  # the bias has the buckets

    tables = {
        layer.attention.self: _tables(layer.attention.self, encoder.get_rel_embedding())
        for layer in encoder.layer
    }

    def bias_of(self: Any, queries: Any, keys: Any, *_: Any) -> Any:
        span, heads, length = self.pos_ebd_size, self.num_attention_heads, queries.size(-2)
        near = torch.arange(2 * length - 1) - (length - 1) + (max_length - 1)
        scale = math.sqrt(queries.size(-1) * (1 + len(tables[self])))

        def scores(states: Any, kind: str, towards: int) -> Any:
            """Scores of a row's token with its distance to a column's, [batch * heads, n, n]."""
            rows = (towards * buckets + span).clamp(0, 2 * span - 1)[near]
            found = torch.nn.functional.embedding(rows, tables[self][kind])
            found = found.view(-1, heads, states.size(-1)).permute(1, 2, 0)
            split = states.view(-1, heads, length, states.size(-1))
            return _shifted(split @ found).flatten(0, 1) / scale

        total = 0
        if "c2p" in tables[self]:
            total = scores(queries, "c2p", 1)
        if "p2c" in tables[self]:
            total = total + scores(keys, "p2c", -1).transpose(-1, -2)
        return total

    try:
        for name, function in compiled.items():
            setattr(module, name, function._torchdynamo_inline)
        module.build_relative_position = no_positions
        attention.disentangled_attention_bias = bias_of
        yield
    finally:
        for name, function in compiled.items():
            setattr(module, name, function)
        module.build_relative_position = positions
        attention.disentangled_attention_bias = bias


def _tables(attention: Any, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer's projected embeddings of buckets, [buckets, hidden], by kind of attention.

    They are c2p (from content to position) and p2c.
    """
    shared = attention.share_att_key
    projections = {
        "c2p": "key_proj" if shared else "pos_key_proj",
        "p2c": "query_proj" if shared else "pos_query_proj",
    }
    with torch.inference_mode():
        rows = embeddings[: 2 * attention.pos_ebd_size]
        found = {
            kind: getattr(attention, name)(rows)
            for kind, name in projections.items()
            if kind in attention.pos_att_type
        }
    return {kind: table.clone() for kind, table in found.items()}


def _shifted(scores: torch.Tensor) -> torch.Tensor:
    """Scores by column instead of by distance.

    Args:
        scores: shape [..., n, 2 n - 1]; in row i, item n - 1 + j - i is column j's.

    Returns:
        Shape [..., n, n]. As in Transformer-XL, a padded column moves each row one item further.
    """
    *before, rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores, (1, 0))
    moved = padded.reshape(*before, columns + 1, rows)[..., 1:, :]
    return moved.reshape(*before, rows, columns)[..., :rows]
