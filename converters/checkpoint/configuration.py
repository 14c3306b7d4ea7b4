"""A checkpoint's config.json: as the class that it is read as, with transformers' defaults."""

from __future__ import annotations

import logging
from functools import partial
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from qrank.converters.checkpoint import gte, jina_v1, jina_v2, minicpm, module_chain, qwen_vl
from qrank.converters.checkpoint.json_files import check_kinds, explained, read_json
from qrank.converters.checkpoint.rewriting import Rewriting
from qrank.converters.checkpoint.stored import parts_of, safetensors_files
from qrank.errors import ConversionError, FamilyError, ModelNotFoundError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NEMOTRON = "llama_bidirec"

_CLASSES = {NEMOTRON: "nemotron", "gte": "gte_class", "jina_bert": "jina_v1_class"}
"""`model_type` of a class that transformers lacks -> the module here that has it."""

OWN_CLASSES = frozenset(_CLASSES)
"""Values of `model_type` that transformers does not know."""

_ENCODER_DECODERS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")

_KINDS_OF_REWRITING = (
    module_chain.rewriting,
    jina_v1.rewriting,
    jina_v2.rewriting,
    gte.rewriting,
    minicpm.rewriting,
    qwen_vl.rewriting,
)

log = logging.getLogger("qrank")


def read_config(folder: Path, source: str | None = None) -> dict[str, Any]:
    """The config.json of a folder, rewritten if the checkpoint is read as another class.

    Args:
        folder: a checkpoint's folder.
        source: the checkpoint's name in errors; None: the folder's path.

    Raises:
        ModelNotFoundError: there is no config.json.
        ConversionError: it is not a JSON object, or its `architectures` is not a list of names.
        FamilyError: it is of a kind that is rewritten, but not exactly; see `rewriting`.
    """
    return read_rewriting(folder, source).config


def read_rewriting(folder: Path, source: str | None = None) -> Rewriting:
    """How a folder's checkpoint is read: as another class, or as it is.

    Raises as `read_config`.
    """
    source = source or str(folder)
    config = _as_written(folder, source)
    for kind in _KINDS_OF_REWRITING:
        if (found := kind(folder, config, source)) is not None:
            return found
    return Rewriting("", config, partial(safetensors_files, folder, source), parts_of)


def _as_written(folder: Path, source: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = read_json(folder / "config.json", dict, source)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{source} is no checkpoint: it holds no config.json") from None
    named = config.get("architectures")
    if named is not None and not (
        isinstance(named, list) and all(isinstance(name, str) for name in named)
    ):
        raise ConversionError(
            f"{source}: config.json has architectures = {named!r}; expected a list of class names"
        )
    return config


def read_settings(config: dict[str, Any], source: str) -> PretrainedConfig:
    """A config.json with transformers' defaults for missing keys.

    Args:
        config: its config.json.
        source: the checkpoint's name in errors.

    Raises:
        FamilyError: transformers has no class for it, or its weights are quantized.
        ConversionError: transformers does not accept a value.
    """
    kinds = {"auto_map": (dict,), "num_labels": (int,), "sentence_transformers": (dict, NoneType)}
    check_kinds(config, kinds, "config.json", source)
    kind, code = config.get("model_type"), _code(config)
    if not isinstance(kind, str):
        raise FamilyError(
            f"{source}: config.json has model_type = {kind!r}; expected transformers' name of a "
            f"kind of model, such as 'bert'{code}"
        )
    transformers = transformers_for(config)
    if kind not in transformers.CONFIG_MAPPING:
        raise FamilyError(
            f"{source}: config.json has model_type = {kind!r}, which transformers "
            f"{transformers.__version__} does not know{code}"
        )
    if code and kind not in _CLASSES:
        log.warning(
            "%s: config.json names code of its own (auto_map). qrank does not run it: scores are "
            "those of transformers' own class for %s",
            source,
            kind,
        )
    if "quantization_config" in config:
        raise FamilyError(
            f"{source}: config.json has a quantization_config; qrank converts checkpoints whose "
            "weights are not quantized: take the original one"
        )
    with explained(f"{source}: transformers cannot take its config.json"):
        return make_settings(config)


def make_settings(config: dict[str, Any]) -> PretrainedConfig:
    """transformers' configuration for a config.json that `read_settings` accepts."""
    kind = transformers_for(config).CONFIG_MAPPING[config["model_type"]]
    settings: PretrainedConfig = kind.from_dict(config)
    return settings


def whole_number(settings: PretrainedConfig, key: str, source: str, least: int = 1) -> int:
    """A number of a configuration, by the name that all transformers classes share.

    Raises:
        ConversionError: it is missing, not a whole number or too small.
    """
    value = getattr(settings, key, None)
    if type(value) is not int or value < least:
        raise ConversionError(
            f"{source}: config.json has {key} = {value!r}; expected a whole number from {least} on"
        )
    return value


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a causal language model."""
    return str((config.get("architectures") or [""])[0]).endswith("ForCausalLM")


def is_encoder_decoder(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a T5, whose decoder scores at its first step."""
    return (config.get("architectures") or [""])[0] in _ENCODER_DECODERS


def is_language_model(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a model that gives logits of its vocabulary."""
    return is_causal(config) or is_encoder_decoder(config)


def transformers_for(config: dict[str, Any]) -> Any:
    """The transformers module, with qrank's own class registered if a config.json needs it.

    Only then: the class needs torch, which prebuilt models do not.
    """
    transformers = need("transformers")
    if (module := _CLASSES.get(config.get("model_type", ""))) is not None:
        need("torch")
        import_module(f"qrank.converters.checkpoint.{module}")  # this registers the class
    return transformers


def auto_class(config: dict[str, Any]) -> Any:
    """The transformers class that builds a model from a config.json."""
    transformers = transformers_for(config)
    if is_causal(config):
        return transformers.AutoModelForCausalLM
    if is_encoder_decoder(config):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForSequenceClassification


def _code(config: dict[str, Any]) -> str:
    """The part of an error about code that a checkpoint brings; "" if it brings none."""
    if not (named := config.get("auto_map")):
        return ""
    names = sorted(map(str, named.values()))
    return (
        f". The checkpoint brings code of its own for it (auto_map: {', '.join(names)}), and qrank "
        "runs no code of a checkpoint"
    )
