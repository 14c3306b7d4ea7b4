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
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel


class JinaBertConfig(BertConfig):  # type: ignore[misc]
    """BERT's configuration."""

    model_type = "jina_bert"


class JinaBertForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """The logit is a row times the tanh of a dense layer of the first token's final state."""

    config_class = JinaBertConfig
    base_model_prefix = "bert"

    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__(config)
        self.bert = _Model(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of shape [batch, labels]; all inputs are int64 of shape [batch, length]."""
        pooled = self.bert(input_ids, attention_mask, token_type_ids)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


class _Model(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config.hidden_size)
        self.slopes = alibi_slopes(config.num_attention_heads)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = self.embeddings(input_ids, token_type_ids)
        seen = attention_mask[:, None, None].bool()
        mask = torch.where(seen, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        distances = (places[:, None] - places[None]).abs().float()
        slopes = torch.tensor(self.slopes, device=input_ids.device)
        bias = (-slopes[:, None, None] * distances)[None].to(hidden.dtype)
        pooled: torch.Tensor = self.pooler(self.encoder(hidden, mask, bias)[:, 0])
        return pooled


class _Embeddings(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        if types is None:
            types = torch.zeros_like(input_ids)
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        normal: torch.Tensor = self.LayerNorm(hidden)
        return normal


class _Encoder(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            hidden = layer(hidden, mask, bias)
        return hidden


class _Pooler(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(first))


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
        batch, length, _ = hidden.shape
        queries, keys, values = (
            linear(hidden).view(batch, length, -1, self.width).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        scores = queries @ keys.transpose(2, 3) / math.sqrt(self.width) + bias + mask
        mixed: torch.Tensor = (scores.softmax(-1) @ values).transpose(1, 2)
        return mixed.reshape(batch, length, -1)


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
