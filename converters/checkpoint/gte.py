"""gte-multilingual-reranker, read as the class that transformers has for it from 5.19 on.

Its repository brings code of its own, which is not run. Names and fused matrices are those of that
code (Alibaba-NLP/new-impl); transformers' conversion_mapping.py has the same table. Until qrank
uses such a transformers, the class is in `gte_class.py`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.rewriting import Rewriting, WeightMap, check_keys
from qrank.converters.checkpoint.stored import Part, parts_of, safetensors_files
from qrank.errors import FamilyError

_ARCHITECTURES = ("NewForSequenceClassification", "GteForSequenceClassification")

_EXPECTED: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
}
"""Keys of config.json that change the computation -> the value that the class computes."""

_FUSED = re.compile(r"(.*)(attention\.qkv_proj|mlp\.up_gate_proj)\.(weight|bias)")

_PARTS = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
}
"""A fused matrix -> the names of its parts, in order."""

_NAMES = {
    "encoder.layer.": "layers.",
    "attention.o_proj.": "self_attn.o_proj.",
    "attn_ln.": "post_attention_layernorm.",
    "mlp_ln.": "post_mlp_layernorm.",
}
"""Parts of other names -> transformers'."""


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """The class for gte-multilingual-reranker; None for other checkpoints.

    Raises:
        FamilyError: config.json asks for what the class does not compute.
    """
    if (config.get("architectures") or [""])[0] not in _ARCHITECTURES:
        return None
    check_keys(config, _EXPECTED, "this class", source)
    made = {k: v for k, v in config.items() if k not in ("auto_map", "rope_scaling", *_EXPECTED)}
    made |= {
        "architectures": ["GteForSequenceClassification"],
        "model_type": "gte",
        "rope_parameters": config.get("rope_parameters") or _rotary(config, source),
    }
    return Rewriting(
        "gte-multilingual-reranker", made, partial(safetensors_files, folder, source), _weights
    )


def _rotary(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The rotary positions by transformers' names.

    The repository's NTK scaling multiplies the base by the factor and divides each frequency by
    factor^(2 / width), at all lengths: transformers' linear scaling of the larger base.

    Raises:
        FamilyError: positions are scaled in another way.
    """
    base = float(config.get("rope_theta", 10000.0))
    if (scaling := config.get("rope_scaling")) is None:
        return {"rope_type": "default", "rope_theta": base}
    given = scaling if isinstance(scaling, dict) else {}
    factor = given.get("factor")
    plain = given.keys() <= {"type", "factor", "mixed_b"} and given.get("mixed_b") is None
    if (
        given.get("type") != "ntk"
        or not plain
        or not isinstance(factor, int | float)
        or factor <= 0
    ):
        raise FamilyError(
            f"{source}: config.json has rope_scaling = {scaling!r}; qrank reads null, or the type "
            "'ntk' with a factor above 0"
        )
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "rope_type": "linear",
        "rope_theta": base * factor,
        "factor": float(factor) ** (2 / width),
    }


def _weights(files: list[Path]) -> WeightMap:
    found: dict[str, Part] = {}
    for stored, part in parts_of(files).items():
        name = re.sub(r"^new\.", "gte.", stored)
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if fused := _FUSED.fullmatch(name):
            before, matrix, parameter = fused.groups()
            kinds = _PARTS[matrix]
            for kind, one in zip(kinds, part.split(len(kinds)), strict=True):
                found[f"{before}{kind}.{parameter}"] = one
        else:
            found[name] = part
    return found
