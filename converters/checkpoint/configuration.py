"""Read a checkpoint's JSON files as transformers does; errors name the key."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from qrank.errors import ConversionError, FamilyError, ModelNotFoundError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NEMOTRON = "llama_bidirec"
"""The `model_type` of the class in `qrank.converters.checkpoint.nemotron`."""

log = logging.getLogger("qrank")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a damaged checkpoint into a ConversionError."""
    try:
        yield
    except Exception as error:  # OSError, TypeError, SafetensorError, ...: they share no base
        reason = " ".join(str(error).split())
        raise ConversionError(f"{what}: {reason}") from error


def read_json(path: Path, kind: type, source: str, name: str = "") -> Any:
    """A JSON file of a checkpoint.

    Args:
        path: the file's path.
        kind: the expected type: dict or list.
        source: the checkpoint's name in errors.
        name: the file's name in errors; "" for its own name.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is not JSON of that type.
    """
    name = name or path.name
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{source}: {name} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        expected = "object" if kind is dict else "array"
        raise ConversionError(f"{source}: {name} is not a JSON {expected}")
    return content


def check_kinds(
    content: dict[str, Any], kinds: Mapping[str, tuple[type, ...]], file: str, source: str
) -> None:
    """Check that keys of a JSON file, if present, have the types that transformers expects.

    Raises:
        ConversionError: a key has another type.
    """
    for key, kind in kinds.items():
        if key in content and type(content[key]) not in kind:
            names = " or ".join(_NAMES[k] for k in kind)
            raise ConversionError(
                f"{source}: {file} has {key} = {content[key]!r}; expected {names}"
            )


_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    NoneType: "null",
    str: "a text",
}


def read_config(folder: Path, source: str | None = None) -> dict[str, Any]:
    """The config.json of a folder.

    Args:
        folder: a checkpoint's folder.
        source: the checkpoint's name in errors; None: the folder's path.

    Raises:
        ModelNotFoundError: there is no config.json.
        ConversionError: it is not a JSON object, or its `architectures` is not a list of names.
    """
    source = source or str(folder)
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


def read_settings(folder: Path, config: dict[str, Any], source: str) -> PretrainedConfig:
    """A config.json with transformers' defaults for missing keys.

    Args:
        folder: the checkpoint's folder.
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
    if code and kind != NEMOTRON:
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
        settings: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
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


def transformers_for(config: dict[str, Any]) -> Any:
    """The transformers module, with qrank's own class registered if a config.json needs it.

    Only then: the class needs torch, which prebuilt models do not.
    """
    transformers = need("transformers")
    if config.get("model_type") == NEMOTRON:
        need("torch")
        import qrank.converters.checkpoint.nemotron  # noqa: F401 (the import registers the class)
    return transformers


def auto_class(config: dict[str, Any]) -> Any:
    """The transformers class that builds a model from a config.json."""
    transformers = transformers_for(config)
    if is_causal(config):
        return transformers.AutoModelForCausalLM
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
