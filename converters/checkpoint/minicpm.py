"""bge-reranker-v2-minicpm-layerwise, read as Llama: its scales are multiplied into the weights.

The repository brings code of its own, which is not run. MiniCPM is Llama with three factors: of the
embeddings, and of what attention and the feed-forward network add. A head behind each of the last
layers scores; like every published example, qrank takes the one behind layer 28, and drops the
layers after it. Source: FlagEmbedding's modeling_minicpm_reranker.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.rewriting import ONE_LABEL, Rewriting, WeightMap
from qrank.converters.checkpoint.stored import Part, parts_of, safetensors_files
from qrank.errors import ConversionError, FamilyError

LAYERS = 28
"""Layers that are kept, of 40."""

_ARCHITECTURE = "LayerWiseMiniCPMForCausalLM"
_OWN = ("auto_map", "dim_model_base", "head_multi", "head_type", "scale_depth", "scale_emb")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_ADDED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""The matrices whose results are added to the hidden state."""


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """Llama for bge-reranker-v2-minicpm-layerwise; None for other checkpoints.

    Raises:
        FamilyError: config.json asks for another head.
        ConversionError: a number that the weights are multiplied by is missing.
    """
    if _ARCHITECTURE not in (config.get("architectures") or []):
        return None
    for key, expected in {"head_type": "simple", "head_multi": True}.items():
        if (found := config.get(key)) != expected:
            raise FamilyError(
                f"{source}: config.json has {key} = {found!r}; qrank reads {_ARCHITECTURE} with "
                f"{expected!r} alone"
            )
    for key in ("scale_emb", "scale_depth", "num_hidden_layers", "start_layer"):
        if type(config.get(key)) not in (int, float):
            raise ConversionError(
                f"{source}: config.json has {key} = {config.get(key)!r}; expected a number"
            )
    layers = min(LAYERS, config["num_hidden_layers"])
    if layers < config["start_layer"]:
        raise FamilyError(
            f"{source}: config.json has start_layer = {config['start_layer']}, and qrank takes the "
            f"head behind layer {layers}"
        )
    made = {key: value for key, value in config.items() if key not in (*_OWN, "start_layer")}
    made |= {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        **ONE_LABEL,
    }
    return Rewriting(
        f"bge-reranker-v2-minicpm-layerwise ({layers} layers)",
        made,
        partial(safetensors_files, folder, source),
        partial(_weights, config, layers),
        family="bge-reranker-gemma",
    )


def _weights(config: dict[str, Any], layers: int, files: list[Path]) -> WeightMap:
    added = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    head = f"lm_head.{layers - config['start_layer']}.linear_head.weight"
    found: dict[str, Part] = {}
    for name, part in parts_of(files).items():
        if name == head:
            found["score.weight"] = part
        elif name == "model.embed_tokens.weight":
            found[name] = replace(part, factor=float(config["scale_emb"]))
        elif layer := _LAYER.fullmatch(name):
            if int(layer[1]) < layers:
                found[name] = replace(part, factor=added) if layer[2] in _ADDED else part
        elif not name.startswith("lm_head."):
            found[name] = part
    return found
