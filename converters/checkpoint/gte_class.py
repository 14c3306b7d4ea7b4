"""GteForSequenceClassification, which transformers has from 5.19 on, made of its own layers.

A BERT with rotary positions and a gated feed-forward network. Importing this module registers the
class with transformers and needs torch. `tests/test_oracles.py` compares it with
transformers' class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qrank.converters.checkpoint.encoder_parts import (
    Embeddings,
    FirstTokenClassifier,
    Pooler,
    mixed,
    padding_mask,
    split_heads,
)
from qrank.errors import FamilyError


class GteConfig(PretrainedConfig):  # type: ignore[misc]
    """The configuration, with the defaults of transformers' class."""

    model_type = "gte"
    vocab_size: int = 250048
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 1
    rope_parameters: dict[str, Any] | None = None


class GteForSequenceClassification(FirstTokenClassifier):
    """See `FirstTokenClassifier`.

    Raises:
        FamilyError: the configuration scales rotary positions in an unknown way.
    """

    config_class = GteConfig
    base_model_prefix = "gte"

    def __init__(self, config: GteConfig) -> None:
        super().__init__(config, _Model(config))


class _Model(nn.Module):
    def __init__(self, config: GteConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = Pooler(config.hidden_size)
        self.config = config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = padding_mask(attention_mask, hidden.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = places[:, None].float() * frequencies(self.config).to(input_ids.device)
        angles = torch.cat((angles, angles), -1)[None]
        rotation = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask, rotation)
        pooled: torch.Tensor = self.pooler(hidden[:, 0])
        return pooled


class _Layer(nn.Module):
    def __init__(self, config: GteConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _FeedForward(config)
        self.post_mlp_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        hidden = self.post_attention_layernorm(hidden + self.self_attn(hidden, mask, rotation))
        normal: torch.Tensor = self.post_mlp_layernorm(hidden + self.mlp(hidden))
        return normal


class _Attention(nn.Module):
    def __init__(self, config: GteConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.width = size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(size, size) for _ in range(4)
        )

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        queries, keys, values = (
            split_heads(linear(hidden), self.width)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotation)
        scores = queries @ keys.transpose(2, 3) * self.width**-0.5 + mask
        out: torch.Tensor = self.o_proj(mixed(scores, values))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: GteConfig) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, wide, bias=False)
        self.up_proj = nn.Linear(size, wide, bias=False)
        self.down_proj = nn.Linear(wide, size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(
            self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)
        )
        return out


def frequencies(config: GteConfig) -> torch.Tensor:
    """The rotary frequencies, fp32 of shape [width / 2].

    Raises:
        FamilyError: they are scaled in an unknown way.
    """
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise FamilyError(
            f"config.json has rope_type = {kind!r} in rope_parameters; qrank computes 'default' "
            "and 'linear' for this class"
        )
    if kind == "linear":
        return torch.as_tensor(ROPE_INIT_FUNCTIONS["linear"](config, "cpu")[0]).float()
    width = config.hidden_size // config.num_attention_heads
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    return torch.as_tensor(1.0 / parameters["rope_theta"] ** steps)


AutoConfig.register(GteConfig.model_type, GteConfig)
AutoModelForSequenceClassification.register(GteConfig, GteForSequenceClassification)
