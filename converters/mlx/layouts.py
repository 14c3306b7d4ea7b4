"""Which modules of transformers' classes are which of qrank's graphs in MLX, and how they compute.

Our modules are those of `qrank/backends/mlx_encoder.py` and `mlx_decoder.py`. Matrices that read
the same vector are one: queries, keys and values; both halves of a gated feed-forward network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qrank.errors import ConversionError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""transformers' names of activations -> our graphs'."""

Modules = Mapping[str, tuple[str, ...]]
"""Our module -> those of the checkpoint whose rows it has, in order."""


@dataclass(frozen=True)
class Layout:
    """How our graph computes one transformers class.

    Attributes:
        modules: outside the layers, without a language model's head.
        layer: where a layer's modules are, with its number as `{}`.
        parts: modules of a layer. Those that no layer has are left out.
        head_activation: the one behind `head.dense`, as `activation` takes it.
        activation: the layers', likewise.
        eps: the config key of the norms' epsilon; a number if it is in no configuration.
        language_model: whether it is a causal language model or made from one: its norms are RMS
            norms, and its head is one row, `head.out`.
        pre: whether a layer's norms come before its blocks, and not behind the sums.
        gated: whether the feed-forward network has two halves, of which one is a factor.
        rotary: whether positions are rotary.
        after_pad: whether the position table begins with pad_token_id + 1 unused rows.
        norms_minus_one: whether the checkpoint stores norm weights minus 1 (Gemma).
        scaled_embeddings: whether embeddings are multiplied by sqrt(hidden_size).
    """

    modules: Modules
    layer: str
    parts: Modules
    head_activation: str = "tanh"
    activation: str = "hidden_act"
    eps: str | float = "layer_norm_eps"
    language_model: bool = False
    pre: bool = False
    gated: bool = False
    rotary: bool = False
    after_pad: bool = False
    norms_minus_one: bool = False
    scaled_embeddings: bool = False

    @classmethod
    def of(cls, architecture: str) -> Layout:
        """The layout of a transformers class.

        Raises:
            ConversionError: our graphs do not compute it.
        """
        if architecture not in _LAYOUTS:
            raise ConversionError(
                f"qrank has no MLX graph of {architecture}; it has one of: {', '.join(_LAYOUTS)}"
            )
        return _LAYOUTS[architecture]

    def places(self, layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Our modules, and those of the checkpoint, for a number of layers."""
        yield from self.modules.items()
        for number in range(layers):
            where = self.layer.format(number)
            for part, theirs in self.parts.items():
                yield f"layers.{number}.{part}", tuple(where + name for name in theirs)


def activation(name: str, config: PretrainedConfig) -> str:
    """An activation by our name.

    Args:
        name: transformers' name, or the config key that has it.
        config: the checkpoint's configuration.

    Raises:
        ConversionError: our graphs do not compute it.
    """
    found = name if name in ACTIVATIONS else getattr(config, name)
    if found not in ACTIVATIONS:
        raise ConversionError(
            f"{name} is {found!r} in config.json; qrank's MLX graphs compute: "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[found]


def _bert(base: str, **head: str) -> Layout:
    return Layout(
        modules={
            "words": (f"{base}.embeddings.word_embeddings",),
            "positions": (f"{base}.embeddings.position_embeddings",),
            "types": (f"{base}.embeddings.token_type_embeddings",),
            "embeddings": (f"{base}.embeddings.LayerNorm",),
            **{f"head.{ours}": (theirs,) for ours, theirs in head.items()},
        },
        layer=f"{base}.encoder.layer.{{}}.",
        parts={
            "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
            "out": ("attention.output.dense",),
            "attention_norm": ("attention.output.LayerNorm",),
            "up": ("intermediate.dense",),
            "down": ("output.dense",),
            "mlp_norm": ("output.LayerNorm",),
        },
    )


_ROBERTA = replace(
    _bert("roberta", dense="classifier.dense", out="classifier.out_proj"), after_pad=True
)

_ELECTRA = _bert("electra", dense="classifier.dense", out="classifier.out_proj")

_LANGUAGE_MODEL = Layout(
    modules={"words": ("model.embed_tokens",), "final": ("model.norm",)},
    layer="model.layers.{}.",
    parts={
        "attention_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "query_norm": ("self_attn.q_norm",),
        "key_norm": ("self_attn.k_norm",),
        "out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    eps="rms_norm_eps",
    language_model=True,
    pre=True,
    gated=True,
    rotary=True,
)

_LAYOUTS: Mapping[str, Layout] = {
    "BertForSequenceClassification": _bert("bert", dense="bert.pooler.dense", out="classifier"),
    **dict.fromkeys(
        (
            "XLMRobertaForSequenceClassification",
            "RobertaForSequenceClassification",
            "CamembertForSequenceClassification",
        ),
        _ROBERTA,
    ),
    "ElectraForSequenceClassification": replace(
        _ELECTRA,
        modules={**_ELECTRA.modules, "projection": ("electra.embeddings_project",)},
        head_activation="gelu",
    ),
    "DistilBertForSequenceClassification": Layout(
        modules={
            "words": ("distilbert.embeddings.word_embeddings",),
            "positions": ("distilbert.embeddings.position_embeddings",),
            "embeddings": ("distilbert.embeddings.LayerNorm",),
            "head.dense": ("pre_classifier",),
            "head.out": ("classifier",),
        },
        layer="distilbert.transformer.layer.{}.",
        parts={
            "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "out": ("attention.out_lin",),
            "attention_norm": ("sa_layer_norm",),
            "up": ("ffn.lin1",),
            "down": ("ffn.lin2",),
            "mlp_norm": ("output_layer_norm",),
        },
        head_activation="relu",
        activation="activation",
        eps=1e-12,
    ),
    "GteForSequenceClassification": Layout(
        modules={
            "words": ("gte.embeddings.word_embeddings",),
            "types": ("gte.embeddings.token_type_embeddings",),
            "embeddings": ("gte.embeddings.LayerNorm",),
            "head.dense": ("gte.pooler.dense",),
            "head.out": ("classifier",),
        },
        layer="gte.layers.{}.",
        parts={
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "out": ("self_attn.o_proj",),
            "attention_norm": ("post_attention_layernorm",),
            "up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
            "mlp_norm": ("post_mlp_layernorm",),
        },
        gated=True,
        rotary=True,
    ),
    "ModernBertForSequenceClassification": Layout(
        modules={
            "words": ("model.embeddings.tok_embeddings",),
            "embeddings": ("model.embeddings.norm",),
            "final": ("model.final_norm",),
            "head.dense": ("head.dense",),
            "head.norm": ("head.norm",),
            "head.out": ("classifier",),
        },
        layer="model.layers.{}.",
        parts={
            "attention_norm": ("attn_norm",),
            "qkv": ("attn.Wqkv",),
            "out": ("attn.Wo",),
            "mlp_norm": ("mlp_norm",),
            "up": ("mlp.Wi",),
            "down": ("mlp.Wo",),
        },
        head_activation="classifier_activation",
        activation="hidden_activation",
        eps="norm_eps",
        pre=True,
        gated=True,
        rotary=True,
    ),
    **{
        f"{name}For{use}": _LANGUAGE_MODEL
        for name in ("Qwen3", "Qwen2", "Llama", "Mistral")
        for use in ("CausalLM", "SequenceClassification")
    },
    "LlamaBidirectionalForSequenceClassification": _LANGUAGE_MODEL,
    "GemmaForCausalLM": replace(_LANGUAGE_MODEL, norms_minus_one=True, scaled_embeddings=True),
}
"""Layouts by the name of the transformers class."""
