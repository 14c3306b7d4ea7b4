"""What a checkpoint's JSON files say, as transformers takes it; or an error that names the key."""

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
"""What `model_type` is where the class is `qrank.converters.checkpoint.nemotron`'s."""

log = logging.getLogger("qrank")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever transformers raises on a damaged checkpoint into a ConversionError."""
    try:
        yield
    except Exception as error:  # OSError, TypeError, SafetensorError, ...: they share no base
        reason = " ".join(str(error).split())
        raise ConversionError(f"{what}: {reason}") from error


def read_json(path: Path, kind: type, source: str, name: str = "") -> Any:
    """A JSON file of a checkpoint.

    Args:
        path: of the file.
        kind: what it must hold: dict or list.
        source: what to call the checkpoint in an error.
        name: what to call the file; "" for its own name.

    Raises:
        FileNotFoundError: there is none.
        ConversionError: it is no JSON of that kind.
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
    """See that keys of a JSON file are of the types that transformers takes, where they are there.

    Raises:
        ConversionError: one is not.
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
        folder: a checkpoint's.
        source: what to call it in an error; None: as the folder.

    Raises:
        ModelNotFoundError: there is none.
        ConversionError: it is no JSON object, or its `architectures` are not a list of names.
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
    """A config.json with transformers' defaults for what it leaves out.

    Args:
        folder: the checkpoint's.
        config: its config.json.
        source: what to call it in an error.

    Raises:
        FamilyError: transformers has no class for it, or its weights are quantized.
        ConversionError: a value is not what transformers takes.
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
    """A number of a configuration, by the name that transformers has for it in every class.

    Raises:
        ConversionError: there is none, or it is too small.
    """
    value = getattr(settings, key, None)
    if type(value) is not int or value < least:
        raise ConversionError(
            f"{source}: config.json has {key} = {value!r}; expected a whole number from {least} on"
        )
    return value


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a config.json is a causal language model's."""
    return str((config.get("architectures") or [""])[0]).endswith("ForCausalLM")


def transformers_for(config: dict[str, Any]) -> Any:
    """transformers, made to know the class of a config.json where that is ours.

    Only there: that takes torch, which a prebuilt model does not.
    """
    transformers = need("transformers")
    if config.get("model_type") == NEMOTRON:
        need("torch")
        import qrank.converters.checkpoint.nemotron  # noqa: F401 (by being imported)
    return transformers


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' class that makes a model of a config.json."""
    transformers = transformers_for(config)
    if is_causal(config):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


def _code(config: dict[str, Any]) -> str:
    """What an error says of code that a checkpoint brings; "" where it brings none."""
    if not (named := config.get("auto_map")):
        return ""
    names = sorted(map(str, named.values()))
    return (
        f". The checkpoint brings code of its own for it (auto_map: {', '.join(names)}), and qrank "
        "runs no code of a checkpoint"
    )
