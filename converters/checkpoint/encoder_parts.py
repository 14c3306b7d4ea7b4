"""What the encoders have in common that transformers lacks a class for; needs torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel


class FirstTokenClassifier(PreTrainedModel):  # type: ignore[misc]
    """The logit is a row times the tanh of a dense layer of the first token's final state.

    A class of this kind names its trunk by `base_model_prefix`, as all of transformers' do.
    """

    def __init__(self, config: Any, trunk: nn.Module) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, trunk)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of shape [batch, labels]; all inputs are int64 of shape [batch, length]."""
        pooled = self.base_model(input_ids, attention_mask, token_type_ids)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


class Embeddings(nn.Module):
    """Words and token types, normalized; no positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, config.hidden_size) if types else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """Shape [batch, length, hidden]; without types, every token has type 0."""
        hidden = self.word_embeddings(input_ids)
        if self.token_type_embeddings is not None:
            if types is None:
                types = torch.zeros_like(input_ids)
            hidden = hidden + self.token_type_embeddings(types)
        normal: torch.Tensor = self.LayerNorm(hidden)
        return normal


class Pooler(nn.Module):
    """The tanh of a dense layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        """Shape [batch, hidden], as the first token's state."""
        return torch.tanh(self.dense(first))


def padding_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores, shape [batch, 1, 1, length]: nothing, or the lowest for padding."""
    seen = attention_mask[:, None, None].bool()
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def split_heads(projected: torch.Tensor, width: int) -> torch.Tensor:
    """[batch, length, heads * width] -> [batch, heads, length, width]."""
    batch, length, _ = projected.shape
    return projected.view(batch, length, -1, width).transpose(1, 2)


def mixed(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values that attention takes by its scores, heads joined: [batch, length, hidden]."""
    batch, _, length, _ = values.shape
    taken = (scores.softmax(-1) @ values).transpose(1, 2)
    return taken.reshape(batch, length, -1)
