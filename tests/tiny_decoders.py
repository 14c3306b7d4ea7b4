"""Tiny random causal models, like the encoders in `tiny`, with a tokenizer like Qwen's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from qrank.converters.checkpoint.card import cards

VARIANTS = tuple(row for row in tiny.MADE if row != ("openvino", "int8-w8a8"))
"""Every (format, precision) that is available for decoders."""

MAX_LENGTH = 2304
"""Maximum number of tokens of every tiny decoder: the template and a document of 2,000."""

_WIDTH = 64
_VOCABULARY = 1200

_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pieces that Qwen's tokenizer splits text into before merging."""

GAIN = 1.5
"""Factor for attention's output weights: without it, logits hardly differ, because the last
token is always the same."""

SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 2 * _WIDTH,
    "max_position_embeddings": MAX_LENGTH,
}


def qwen3(folder: Path) -> Path:
    """Like Qwen3-Reranker: two labels and a tied output matrix."""
    return save(
        folder, Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
    )


def zerank(folder: Path) -> Path:
    """Like zerank: one label and an untied output matrix."""
    return save(
        folder, Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False)
    )


def qwen3_seq_cls(folder: Path) -> Path:
    """Like tomaarsen/Qwen3-Reranker-0.6B-seq-cls: a score head instead of labels."""
    config = Qwen3Config(**SIZES, head_dim=16, num_labels=1, pad_token_id=0)
    return save(folder, Qwen3ForSequenceClassification, config)


def mxbai(folder: Path) -> Path:
    """Like mxbai-rerank-v2: biases in attention."""
    return save(folder, Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True))


def gemma(folder: Path) -> Path:
    """Like bge-reranker-v2-gemma: one key-value head and scaled embeddings."""
    sizes = {**SIZES, "num_key_value_heads": 1}
    return save(folder, GemmaForCausalLM, GemmaConfig(**sizes, head_dim=32))


def llama(folder: Path) -> Path:
    """Like a user's own model: Llama with the user's own card."""
    return save(folder, LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False))


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "qwen3": qwen3,
    "qwen3-seq-cls": qwen3_seq_cls,
    "zerank": zerank,
    "mxbai": mxbai,
    "gemma": gemma,
    "llama": llama,
}
"""Every kind of tiny decoder."""

FAMILIES = {
    "qwen3": "qwen3-reranker",
    "qwen3-seq-cls": "qwen3-reranker",
    "zerank": "zerank",
    "mxbai": "mxbai-rerank-v2",
    "gemma": "bge-reranker-gemma",
    "llama": str(Path(__file__).with_name("llama.toml")),
}
"""The card of each kind; the checkpoints do not name it."""


def widen(model: PreTrainedModel) -> None:
    """Draw random weights so that logits differ, as `tiny.widen` does."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # A tied output matrix is the embedding matrix.
            wide = 0.6 if "embed" in name else 1.0 / parameter.shape[1] ** 0.5
            torch.nn.init.normal_(parameter, std=wide * (GAIN if "o_proj" in name else 1))
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith("norm.weight"):
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    if hasattr(model, "score"):
        model.score.weight.data.mul_(3)
    if isinstance(model.config, GemmaConfig):
        # Gemma's norms multiply by 1 + weight.
        model.model.norm.weight.data.add_(4)


def save(folder: Path, kind: type[PreTrainedModel], config: PretrainedConfig) -> Path:
    torch.manual_seed(4)
    model = kind(config)
    widen(model)
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "bos_token": "<bos>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    return folder


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Not those of other families: with another vocabulary, the models would score other texts.
    causal = [card for card in cards() if card.pooling == "last"]
    labels = [f"{label}\n" for card in causal for label in card.labels]
    prompts = ["".join(card.template) for card in causal]
    tokenizer.train_from_iterator(
        [*tiny.texts(), *labels * 50, *prompts],
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY - 50,
            special_tokens=["<|endoftext|>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    # As in the real one: added tokens that are not special.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    return tokenizer


CHAT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {{ messages | selectattr('role', 'eq', 'system') "
    "| map(attribute='content') | first }}\n<Query>: {{ messages "
    "| selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages "
    "| selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
METADATA: dict[str, Any] = {
    "modules.json": [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.base.modules.transformer.Transformer",
        },
        {
            "idx": 1,
            "name": "1",
            "path": "1_LogitScore",
            "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
        },
    ],
    "config_sentence_transformers.json": {
        "model_type": "CrossEncoder",
        "prompts": {
            "query": "Given a web search query, retrieve relevant passages that answer the query"
        },
        "default_prompt_name": "query",
    },
    "sentence_bert_config.json": {
        "transformer_task": "text-generation",
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "logits"},
            "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
        },
        "module_output_name": "causal_logits",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    },
}


def describe(folder: Path) -> Path:
    """Add LogitScore metadata to a checkpoint, as saved by sentence-transformers."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = (tokenizer.encode(word).ids[0] for word in ("yes", "no"))
    (folder / "1_LogitScore").mkdir()
    ids = {"1_LogitScore/config.json": {"true_token_id": yes, "false_token_id": no}}
    for name, value in (METADATA | ids).items():
        (folder / name).write_text(json.dumps(value), "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT, "utf-8")
    return folder
