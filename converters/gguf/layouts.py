"""How llama.cpp names and describes the contents of transformers' classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.family import Family
from qrank.converters.gguf import gated_delta
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Layout:
    """How llama.cpp represents one transformers class.

    Attributes:
        arch: llama.cpp's name of the architecture.
        cls: an encoder's score head: module in the checkpoint -> tensor in the file.
        act: the config key of the activation.
        known_act: the required activation: llama.cpp has no other for this architecture.
        eps: the config key of the norms' epsilon.
        after_pad: whether the position table begins with pad_token_id + 1 unused rows.
        norms_minus_one: whether the checkpoint stores norm weights minus 1 (Gemma); llama.cpp
            expects them without the offset.
        gated_delta: whether some layers are gated delta nets, see `gated_delta.py` (Qwen3.5).
        interleaved_rope: whether llama.cpp's rotary positions rotate neighbouring dimensions of a
            head together (Llama); transformers rotates those that are half a head apart.
        head: modules that are not part of the file: the head of a model that is or was causal is
            stored next to it.
    """

    arch: str
    cls: Mapping[str, str] = field(default_factory=dict)
    act: str = "hidden_act"
    known_act: str = "gelu"
    eps: str = "layer_norm_eps"
    after_pad: bool = False
    norms_minus_one: bool = False
    gated_delta: bool = False
    interleaved_rope: bool = False
    head: tuple[str, ...] = ()

    @classmethod
    def of(cls, architecture: str) -> Layout:
        """The layout of a transformers class.

        Raises:
            ConversionError: no layout is known.
        """
        if architecture not in _LAYOUTS:
            raise ConversionError(
                f"no GGUF layout of {architecture} is known; known are: {', '.join(_LAYOUTS)}"
            )
        return _LAYOUTS[architecture]

    def check(self, config: PretrainedConfig, window: int | None) -> None:
        """Check that llama.cpp computes what a configuration says.

        Args:
            config: the checkpoint's configuration.
            window: see `qrank.converters.checkpoint.read.Checkpoint`.

        Raises:
            ConversionError: it does not.
        """
        for key in (self.act, "classifier_activation"):
            if (found := getattr(config, key, None)) not in (None, self.known_act):
                raise ConversionError(
                    f"{key} is {found!r}; llama.cpp knows {self.known_act} alone here"
                )
        if window is not None:
            raise ConversionError(
                f"llama.cpp's {self.arch} attends to everything, and not to a window of {window} "
                "tokens (sliding_window in config.json)"
            )

    def tensor_names(self, layers: int) -> Callable[[str], str | None]:
        """A function from a checkpoint module to its tensor in the file, None if there is none.

        It uses the names of the package gguf, like llama.cpp's own converter. For some classes,
        gguf knows modules without the first part of their name: `encoder.layer.0...` for BERT. Of
        score heads, it drops BERT's pooler and mistakes `classifier` for another layer.
        """
        gguf = need("gguf")
        (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        known = gguf.get_tensor_name_map(arch, layers)

        def name(module: str) -> str | None:
            if module in self.cls:
                return self.cls[module]
            found: str | None = known.get_name(module) or known.get_name(module.partition(".")[2])
            return found

        return name

    def unread(self, config: PretrainedConfig) -> int:
        """Number of rows of the position table before the first token's row."""
        return config.pad_token_id + 1 if self.after_pad else 0


def _decoder(arch: str, **differences: Any) -> Layout:
    head = ("lm_head", "score")
    common = Layout(arch, known_act="silu", eps="rms_norm_eps", head=head)
    return replace(common, **differences)


_ROBERTA = Layout(
    "bert", {"classifier.dense": "cls", "classifier.out_proj": "cls.output"}, after_pad=True
)

_LAYOUTS = {
    "BertForSequenceClassification": Layout(
        "bert", {"bert.pooler.dense": "cls", "classifier": "cls.output"}
    ),
    "XLMRobertaForSequenceClassification": _ROBERTA,
    "RobertaForSequenceClassification": _ROBERTA,
    "CamembertForSequenceClassification": _ROBERTA,
    "ModernBertForSequenceClassification": Layout(
        "modern-bert",
        {"head.dense": "cls", "head.norm": "cls.norm", "classifier": "cls.output"},
        act="hidden_activation",
        eps="norm_eps",
    ),
    "Qwen3ForCausalLM": _decoder("qwen3"),
    "Qwen3ForSequenceClassification": _decoder("qwen3"),
    "Qwen3_5ForCausalLM": _decoder("qwen35", norms_minus_one=True, gated_delta=True),
    "Qwen2ForCausalLM": _decoder("qwen2"),
    "Qwen2ForSequenceClassification": _decoder("qwen2"),
    "LlamaForCausalLM": _decoder("llama", interleaved_rope=True),
    "LlamaForSequenceClassification": _decoder("llama", interleaved_rope=True),
    "LlamaBidirectionalForSequenceClassification": _decoder("llama-embed", interleaved_rope=True),
    "GemmaForCausalLM": _decoder(
        "gemma",
        act="hidden_activation",
        known_act="gelu_pytorch_tanh",
        norms_minus_one=True,
    ),
}
"""Layouts by the name of the transformers class."""


def describe(
    writer: gguf.GGUFWriter, config: PretrainedConfig, layout: Layout, family: Family
) -> None:
    """Write a file's hyperparameters."""
    writer.add_context_length(config.max_position_embeddings - layout.unread(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if layout.head:
        _describe_decoder(writer, config, layout)
        if not family.decoder:
            writer.add_causal_attention(False)
            writer.add_pooling_type(need("gguf").PoolingType.MEAN)
    else:
        _describe_encoder(writer, config, layout, family)


def _describe_decoder(writer: gguf.GGUFWriter, config: PretrainedConfig, layout: Layout) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if (kind := rope.get("rope_type", "default")) not in ("default", "llama3"):
        raise ConversionError(
            f"rotary positions are scaled by {kind!r}; this converter knows plain ones and 'llama3'"
        )
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(getattr(config, layout.eps))
    writer.add_rope_freq_base(rope["rope_theta"])
    if layout.gated_delta:
        gated_delta.describe(writer, config)


def rotary_factors(config: PretrainedConfig) -> NDArray[np.float32] | None:
    """The divisors of rotary frequencies, float32 [width / 2]; None if they are not scaled."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    need("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** (-np.arange(len(scaled)) / len(scaled))
    factors: NDArray[np.float32] = (plain / scaled.numpy()).astype(np.float32)
    return factors


def _describe_encoder(
    writer: gguf.GGUFWriter, config: PretrainedConfig, layout: Layout, family: Family
) -> None:
    gguf = need("gguf")
    writer.add_layer_norm_eps(getattr(config, layout.eps))
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    if layout.arch == "bert":
        writer.add_token_type_count(config.type_vocab_size)
        return
    ropes = config.rope_parameters
    if scaled := sorted(
        {rope.get("rope_type", "default") for rope in ropes.values()} - {"default"}
    ):
        raise ConversionError(
            f"rotary positions are scaled by {scaled[0]!r}; this converter knows plain ones here"
        )
    pooling = gguf.PoolingType[family.pooling.upper()]
    writer.add_uint32(f"{layout.arch}.classifier.pooling_type", pooling.value)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(config.local_attention)
    writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
