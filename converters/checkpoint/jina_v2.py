"""jina-reranker-v2, read as XLM-RoBERTa: the same model, with queries, keys and values fused.

Its repository brings code of its own, which is not run; jina's own script makes these weights of
transformers' class by renaming and joining, and this is the inverse.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.rewriting import Rewriting, WeightMap, brings
from qrank.converters.checkpoint.stored import Part, parts_of, safetensors_files
from qrank.errors import FamilyError

_CONFIG = "XLMRobertaFlashConfig"
"""The repository's own configuration class."""

_FUSED = re.compile(r"roberta\.encoder\.layers\.(\d+)\.mixer\.Wqkv\.(weight|bias)")

_NAMES = {
    "emb_ln": "embeddings.LayerNorm",
    "layers": "layer",
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""Parts of its names -> transformers'."""

_PART = re.compile("|".join(rf"(?<=\.){re.escape(name)}(?=\.)" for name in _NAMES))


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """XLM-RoBERTa for jina-reranker-v2; None for other checkpoints.

    Raises:
        FamilyError: it has rotary positions or adapters, which XLM-RoBERTa does not.
    """
    if not brings(config, _CONFIG):
        return None
    if (positions := config.get("position_embedding_type")) != "absolute":
        raise FamilyError(
            f"{source}: config.json has position_embedding_type = {positions!r}; qrank reads "
            "jina's XLM-RoBERTa with absolute positions alone"
        )
    if adapters := config.get("lora_adaptations"):
        raise FamilyError(f"{source}: config.json has lora_adaptations = {adapters!r}: an adapter")
    made = {k: v for k, v in config.items() if k != "auto_map"} | {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
    }
    return Rewriting("jina-reranker-v2", made, partial(safetensors_files, folder, source), _weights)


def _weights(files: list[Path]) -> WeightMap:
    found: dict[str, Part] = {}
    for name, part in parts_of(files).items():
        if fused := _FUSED.fullmatch(name):
            for kind, one in zip(("query", "key", "value"), part.split(3), strict=True):
                found[f"roberta.encoder.layer.{fused[1]}.attention.self.{kind}.{fused[2]}"] = one
        else:
            found[_PART.sub(lambda match: _NAMES[match[0]], name)] = part
    return found
