"""Qwen3-VL-Reranker, read as Qwen3 for text: without the part that reads images.

Text has the same position in all three of its rotary sections, so the sections do not matter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.rewriting import Rewriting, WeightMap
from qrank.converters.checkpoint.stored import parts_of, safetensors_files
from qrank.errors import ConversionError

_ARCHITECTURE = "Qwen3VLForConditionalGeneration"
_SECTIONS = ("mrope_interleaved", "mrope_section")


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """Qwen3 for Qwen3-VL; None for other checkpoints.

    Raises:
        ConversionError: config.json does not describe the text model.
    """
    if _ARCHITECTURE not in (config.get("architectures") or []):
        return None
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConversionError(
            f"{source}: config.json has text_config = {text!r}; expected an object"
        )
    made = dict(text)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict):
            made[key] = {k: v for k, v in text[key].items() if k not in _SECTIONS}
    if "tie_word_embeddings" in config:
        made["tie_word_embeddings"] = config["tie_word_embeddings"]
    made |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return Rewriting(
        "the text part of Qwen3-VL", made, partial(safetensors_files, folder, source), _weights
    )


def _weights(files: list[Path]) -> WeightMap:
    return {
        name.replace("model.language_model.", "model."): part
        for name, part in parts_of(files).items()
        if not name.startswith("model.visual.")
    }
