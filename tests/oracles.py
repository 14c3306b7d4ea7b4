"""Logits by the classes that published some rerankers, which qrank's environment does not have.

Weights are drawn from names and shapes, so that a checkpoint made here and one made in another
environment are equal, and only logits are stored, in `data/oracles.json`. To make that file anew,
run each line in an environment with what it names:

    python tests/oracles.py gte          # transformers 5.24
    python tests/oracles.py nemotron     # transformers 5.24, nemo-automodel 0.7.0
    python tests/oracles.py minicpm      # transformers 4.44, FlagEmbedding 1.4.2
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "data" / "oracles.json"

IDS = [[int(x) for x in np.random.default_rng(n).integers(3, 60, n)] for n in (4, 9, 23, 61)]
"""Sequences of token ids; no padding."""

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
_DECODER = _SMALL | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "pad_token_id": 0}

CONFIGS: dict[str, dict[str, Any]] = {
    "gte": _SMALL
    | {
        "architectures": ["NewForSequenceClassification"],
        "auto_map": {"AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig"},
        "hidden_act": "gelu",
        "id2label": {"0": "LABEL_0"},
        "layer_norm_eps": 1e-12,
        "layer_norm_type": "layer_norm",
        "logn_attention_scale": False,
        "max_position_embeddings": 128,
        "model_type": "new",
        "num_hidden_layers": 2,
        "pack_qkv": True,
        "pad_token_id": 1,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": 8.0, "type": "ntk"},
        "rope_theta": 20000,
        "type_vocab_size": 1,
    },
    "nemotron": _DECODER
    | {
        "architectures": ["LlamaBidirectionalForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "max_position_embeddings": 128,
        "model_type": "llama_bidirec",
        "num_hidden_layers": 2,
        "pooling": "avg",
        "temperature": 0.2,
    },
    "minicpm": _DECODER
    | {
        "architectures": ["LayerWiseMiniCPMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_minicpm_reranker.LayerWiseMiniCPMConfig"},
        "dim_model_base": 8,
        "head_multi": True,
        "head_type": "simple",
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "model_type": "minicpm",
        "num_hidden_layers": 4,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "start_layer": 1,
    },
}
"""config.json as published, of tiny models."""

LAYERS = 3
"""Layers of MiniCPM's four that score."""


def shapes(kind: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a model by their published names."""
    size, wide, rows = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    layers = range(config["num_hidden_layers"])
    if kind == "gte":
        found: dict[str, tuple[int, ...]] = {
            "new.embeddings.word_embeddings.weight": (rows, size),
            "new.embeddings.token_type_embeddings.weight": (1, size),
            **_linear("new.embeddings.LayerNorm", size),
            **_linear("new.pooler.dense", size, size),
            **_linear("classifier", 1, size),
        }
        for n in layers:
            layer = f"new.encoder.layer.{n}"
            found |= {
                **_linear(f"{layer}.attention.qkv_proj", 3 * size, size),
                **_linear(f"{layer}.attention.o_proj", size, size),
                **_linear(f"{layer}.attn_ln", size),
                f"{layer}.mlp.up_gate_proj.weight": (2 * wide, size),
                **_linear(f"{layer}.mlp.down_proj", size, wide),
                **_linear(f"{layer}.mlp_ln", size),
            }
        return found
    keys = size // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (rows, size), "model.norm.weight": (size,)}
    for n in layers:
        layer = f"model.layers.{n}"
        found |= {
            f"{layer}.self_attn.q_proj.weight": (size, size),
            f"{layer}.self_attn.k_proj.weight": (keys, size),
            f"{layer}.self_attn.v_proj.weight": (keys, size),
            f"{layer}.self_attn.o_proj.weight": (size, size),
            f"{layer}.mlp.gate_proj.weight": (wide, size),
            f"{layer}.mlp.up_proj.weight": (wide, size),
            f"{layer}.mlp.down_proj.weight": (size, wide),
            f"{layer}.input_layernorm.weight": (size,),
            f"{layer}.post_attention_layernorm.weight": (size,),
        }
    if kind == "nemotron":
        return found | {"score.weight": (1, size)}
    heads = range(len(layers) - config["start_layer"] + 1)
    return found | {f"lm_head.{n}.linear_head.weight": (1, size) for n in heads}


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def write(kind: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint as published, without a tokenizer.

    Args:
        kind: which.
        folder: where; it is made.
        changes: keys of config.json that differ from the published ones.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = CONFIGS[kind] | changes
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    weights = {name: _drawn(name, shape) for name, shape in shapes(kind, config).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        values = 0.1 * normal + (0 if name.endswith("bias") else 1)
    else:
        values = normal * (1 if "embed" in name else 1.5 / math.sqrt(shape[1]))
    return values.astype(np.float32)


def logits(kind: str) -> list[float]:
    """What the class that published a model computes for IDS."""
    import torch

    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        model = _PUBLISHED[kind](Path(place) / kind).float().eval()
        found = []
        for ids in IDS:
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
            inputs["attention_mask"] = inputs["attention_mask"].long()
            if kind == "minicpm":
                (scores,) = model(**inputs, cutoff_layers=[LAYERS]).logits
                found.append(scores[0, -1].item())
            else:
                found.append(model(**inputs).logits.item())
    return found


def _gte(folder: Path) -> Any:
    from transformers import GteForSequenceClassification

    config = CONFIGS["gte"]
    factor, width = config["rope_scaling"]["factor"], 8
    # NTK scaling in new-impl's modeling.py, by transformers' names.
    rotary = {
        "rope_type": "linear",
        "rope_theta": config["rope_theta"] * factor,
        "factor": factor ** (2 / width),
    }
    write("gte", folder, model_type="gte", rope_parameters=rotary, rope_scaling=None, auto_map=None)
    model, info = GteForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    return model


def _nemotron(folder: Path) -> Any:
    # A copy of components/models/llama_bidirectional/model.py under this name.
    module = import_module("llama_bidirectional_model")
    write("nemotron", folder)
    return module.LlamaBidirectionalForSequenceClassification.from_pretrained(folder)


def _minicpm(folder: Path) -> Any:
    # A copy of inference/reranker/decoder_only/models under this name.
    module = import_module("minicpm_models.modeling_minicpm_reranker")
    write("minicpm", folder, auto_map=None)
    config = module.LayerWiseMiniCPMConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    return module.LayerWiseMiniCPMForCausalLM.from_pretrained(folder, config=config)


_PUBLISHED = {"gte": _gte, "nemotron": _nemotron, "minicpm": _minicpm}


def main() -> None:
    """Compute the logits of the kinds named, and store them."""
    stored = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    for kind in sys.argv[1:]:
        stored[kind] = logits(kind)
    FILE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
