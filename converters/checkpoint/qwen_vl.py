"""Qwen3-VL and Qwen3.5, read for text: without the part that reads images.

Text has the same position in all three of its rotary sections, so the sections do not matter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.rewriting import Rewriting, WeightMap
from qrank.converters.checkpoint.stored import parts_of, safetensors_files
from qrank.errors import ConversionError

_CLASSES = {
    "Qwen3VLForConditionalGeneration": ("Qwen3-VL", "Qwen3ForCausalLM", "qwen3"),
    "Qwen3_5ForConditionalGeneration": ("Qwen3.5", "Qwen3_5ForCausalLM", "qwen3_5_text"),
}
"""The class -> its name for people, the class of its text part, and the `model_type` of that."""

HYBRID = ("qwen3_5_text",)
"""`model_type` of causal models in which gated delta nets replace attention in most layers. Their
state is no list of keys and values, as qrank's graphs share them: llama.cpp alone runs them."""

_SECTIONS = ("mrope_interleaved", "mrope_section")


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """The class of the text part; None for other checkpoints.

    Raises:
        ConversionError: config.json does not describe the text model.
    """
    if config.get("model_type") in HYBRID:
        # transformers stores its text part alone under the names that it has in the whole.
        return Rewriting("", config, partial(safetensors_files, folder, source), _weights)
    known = [_CLASSES[x] for x in config.get("architectures") or [] if x in _CLASSES]
    if not known:
        return None
    about, architecture, kind = known[0]
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
    made |= {"architectures": [architecture], "model_type": kind}
    return Rewriting(
        f"the text part of {about}", made, partial(safetensors_files, folder, source), _weights
    )


def _weights(files: list[Path]) -> WeightMap:
    return {
        name.replace("model.language_model.", "model."): part
        for name, part in parts_of(files).items()
        if not name.startswith("model.visual.")
    }
