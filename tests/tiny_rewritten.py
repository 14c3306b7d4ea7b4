"""Tiny random checkpoints as they are published, most of which qrank reads as another class."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import tiny
import tiny_decoders
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qrank.bundle.sequences import Logits
from qrank.converters.checkpoint.ids import checkpoint_ids
from qrank.converters.checkpoint.read import Checkpoint

TEMPERATURE = 0.5
"""What nemotron divides its logits by."""

QWEN3_5 = tiny_decoders.SIZES | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "tie_word_embeddings": True,
}
"""A tiny Qwen3.5: three gated delta nets, with three value heads per key head, and attention."""


def jina_v2(base: Path, folder: Path) -> Path:
    """A tiny XLM-RoBERTa as jina's script stores it: renamed, with queries, keys, values joined."""
    shutil.copytree(base, folder)
    code = {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModelForSequenceClassification": "modeling.XLMRobertaForSequenceClassification",
    }
    tiny.edit_config(folder, auto_map=code, position_embedding_type="absolute", model_type=None)
    names = {
        "roberta.embeddings.LayerNorm": "roberta.emb_ln",
        ".layer.": ".layers.",
        ".attention.output.dense": ".mixer.out_proj",
        ".attention.output.LayerNorm": ".norm1",
        ".intermediate.dense": ".mlp.fc1",
        ".output.dense": ".mlp.fc2",
        ".output.LayerNorm": ".norm2",
    }
    made: dict[str, Any] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if found := re.search(r"\.attention\.self\.(query|key|value)\.", name):
            joined = name.replace(found[0], ".mixer.Wqkv.").replace(".layer.", ".layers.")
            made.setdefault(joined, {})[found[1]] = weight
            continue
        renamed = name
        for theirs, ours in names.items():
            renamed = renamed.replace(theirs, ours)
        made[renamed] = weight
    order = ("query", "key", "value")
    whole = {
        name: torch.cat([weight[part] for part in order]) if isinstance(weight, dict) else weight
        for name, weight in made.items()
    }
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return folder


def nemotron(folder: Path) -> Path:
    """llama-nemotron-rerank as NVIDIA lays it out: Llama's weights, a config with its own code."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        **tiny_decoders.SIZES,
        num_labels=1,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 64,
            **scaling,
        },
    )
    tiny_decoders.save(folder, LlamaForSequenceClassification, config)
    tiny.edit_config(
        folder,
        architectures=["LlamaBidirectionalForSequenceClassification"],
        model_type="llama_bidirec",
        auto_map={"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"},
        pooling="avg",
        temperature=TEMPERATURE,
    )
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    number = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", number)]
    )
    tokenizer.save(path)
    return folder


def minicpm(base: Path, folder: Path) -> Path:
    """bge-reranker-v2-minicpm-layerwise, with another checkpoint's tokenizer."""
    oracles.write("minicpm", folder, vocab_size=1200)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL-Reranker, as sentence-transformers describes it: a chat template of its own name."""
    text = {k: v for k, v in tiny_decoders.SIZES.items() if k != "max_position_embeddings"}
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    config = Qwen3VLConfig(
        text_config=text
        | {
            "head_dim": 16,
            "max_position_embeddings": tiny_decoders.MAX_LENGTH,
            "rope_parameters": rotary | {"mrope_interleaved": True},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64}
        | {"intermediate_size": 16, "deepstack_visual_indexes": []},
        tie_word_embeddings=True,
    )
    tiny_decoders.save(folder, Qwen3VLForConditionalGeneration, config)
    tiny_decoders.describe(folder)
    tiny.edit(folder / "sentence_bert_config.json", transformer_task="any-to-any")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (folder / "chat_template.jinja").rename(templates / "reranker.jinja")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", "utf-8")
    options = {"chat_template": {"add_generation_prompt": True, "chat_template": "reranker"}}
    tiny.edit(folder / "sentence_bert_config.json", processing_kwargs=options)
    return folder


def qwen3_5(folder: Path) -> Path:
    """Qwen3.5 without its part that reads images; its weights are numbers of bf16, as published."""
    tiny_decoders.save(folder, Qwen3_5ForCausalLM, Qwen3_5TextConfig(**QWEN3_5))
    path = folder / "model.safetensors"
    # Otherwise logits hardly differ, because the last token is always the same.
    wide = ("self_attn.o_proj.weight", "linear_attn.out_proj.weight")
    weights = {
        name: (weight * (2 if name.endswith(wide) else 1)).bfloat16().float()
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, {"format": "pt"})
    return folder


def own_logits(
    checkpoint: Checkpoint, kind: type[PreTrainedModel], pairs: list[tuple[str, str]]
) -> Logits:
    """The difference of two of the vocabulary's logits, from the class that was published."""
    model = kind.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    yes, no = checkpoint.family.labels
    found = []
    for query, document in pairs:
        ids = torch.tensor([checkpoint_ids(checkpoint, query, document, tiny_decoders.MAX_LENGTH)])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -1]
        found.append((logits[yes] - logits[no]).item())
    return np.array(found, np.float32)
