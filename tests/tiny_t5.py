"""Tiny random encoder-decoders: T5, and mT5 with what is different there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

MAX_LENGTH = 160
"""Maximum number of tokens, as the tokenizer says."""

LABELS = {"monot5": ("true", "false"), "monomt5": ("yes", "no")}
"""The labels of each family."""

SIZES = {
    "vocab_size": 1400,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
}


def t5(folder: Path) -> Path:
    """T5: ReLU, and the output matrix is the embeddings, scaled."""
    return _save(folder, T5ForConditionalGeneration, T5Config(**SIZES))


def mt5(folder: Path) -> Path:
    """mT5: a gated feed-forward network, and an output matrix of its own."""
    config = MT5Config(**SIZES, feed_forward_proj="gated-gelu")
    _save(folder, MT5ForConditionalGeneration, config)
    weights = load_file(folder / "model.safetensors")
    output = torch.randn(SIZES["vocab_size"], SIZES["d_model"]) * 0.3
    metadata = {"format": "pt"}
    save_file(weights | {"lm_head.weight": output}, folder / "model.safetensors", metadata)
    tiny.edit_config(folder, tie_word_embeddings=False)
    return folder


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {"monot5": t5, "monomt5": mt5}
"""Every kind, by the name of its family."""


def _save(folder: Path, kind: type[PreTrainedModel], config: T5Config) -> Path:
    torch.manual_seed(21)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # Attention is not scaled by the heads' width: T5's queries are.
            wide = 0.6 if "shared" in name else 1.0 / parameter.shape[1] ** 0.5
            narrow = config.d_kv**-0.5 if name.endswith("Attention.q.weight") else 1.0
            torch.nn.init.normal_(parameter, std=wide * narrow)
    # Otherwise logits hardly differ, because the decoder's first token is always the same.
    for layer in model.decoder.block:
        layer.layer[1].EncDecAttention.o.weight.data.mul_(4)
    model.shared.weight.data.mul_(8 if getattr(config, "scale_decoder_outputs", False) else 1)
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    described = {"tokenizer_class": "T5Tokenizer", "model_max_length": MAX_LENGTH, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), "utf-8")
    return folder


def _tokenizer() -> Tokenizer:
    """T5's: its special tokens come first, and only one is put behind a text."""
    pieces = json.loads(tiny.unigram().to_str())["model"]["vocab"]
    words = [word for pair in LABELS.values() for word in pair]
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = dict.fromkeys(special, 0.0) | {f"▁{word}": -6.5 for word in words}
    vocabulary |= {piece: score for piece, score in pieces if score < 0}
    tokenizer = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer
