"""jina-reranker-v1's BERT: ALiBi instead of position embeddings, and a gated feed-forward network.

Importing this module registers the class with transformers and needs torch. Compared with
llama.cpp's `jina-bert-v2` in `tests/test_jina_v1.py`.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig
from transformers.activations import ACT2FN

from qrank.converters.checkpoint.encoder_parts import (
    Embeddings,
    FirstTokenClassifier,
    Pooler,
    mixed,
    padding_mask,
    split_heads,
)


class JinaBertConfig(BertConfig):  # type: ignore[misc]
    """BERT's configuration."""

    model_type = "jina_bert"


class JinaBertForSequenceClassification(FirstTokenClassifier):
    """See `FirstTokenClassifier`."""

    config_class = JinaBertConfig
    base_model_prefix = "bert"

    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__(config, _Model(config))


class _Model(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = Pooler(config.hidden_size)
        self.slopes = alibi_slopes(config.num_attention_heads)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = padding_mask(attention_mask, hidden.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        distances = (places[:, None] - places[None]).abs().float()
        slopes = torch.tensor(self.slopes, device=input_ids.device)
        bias = (-slopes[:, None, None] * distances)[None].to(hidden.dtype)
        pooled: torch.Tensor = self.pooler(self.encoder(hidden, mask, bias)[:, 0])
        return pooled


class _Encoder(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            hidden = layer(hidden, mask, bias)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.mlp = _FeedForward(config)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(self.attention(hidden, mask, bias))
        return out


class _Attention(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Output(config)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        normal: torch.Tensor = self.output(self.self(hidden, mask, bias), hidden)
        return normal


class _SelfAttention(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.width = size // config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        queries, keys, values = (
            split_heads(linear(hidden), self.width) for linear in (self.query, self.key, self.value)
        )
        scores = queries @ keys.transpose(2, 3) / math.sqrt(self.width) + bias + mask
        return mixed(scores, values)


class _Output(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, mixed: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        normal: torch.Tensor = self.LayerNorm(self.dense(mixed) + hidden)
        return normal


class _FeedForward(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.gated_layers = nn.Linear(size, 2 * wide, bias=False)
        self.wo = nn.Linear(wide, size)
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gated_layers(hidden).chunk(2, -1)
        normal: torch.Tensor = self.layernorm(hidden + self.wo(self.activation(gate) * up))
        return normal


def alibi_slopes(heads: int) -> list[float]:
    """How much each head lowers a score per token of distance (ALiBi, Press et al. 2022)."""
    near = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * k / near) for k in range(1, near + 1)]
    more = [2.0 ** (-8 * k / (2 * near)) for k in range(1, 2 * near + 1, 2)]
    return slopes + more[: heads - near]


AutoConfig.register(JinaBertConfig.model_type, JinaBertConfig)
AutoModelForSequenceClassification.register(JinaBertConfig, JinaBertForSequenceClassification)
