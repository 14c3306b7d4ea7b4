"""Read what sentence-transformers' files in a checkpoint say about its scores.

`modules.json` lists the modules that compute them, `config_sentence_transformers.json` has the
activation and the prompt before a query, `sentence_bert_config.json` says how text is read. Each
key is read, or refused if it would change a score. Source: base/model.py,
base/modules/transformer.py and cross_encoder/model.py of sentence-transformers 6.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.json_files import read_json
from qrank.converters.checkpoint.module_chain import MODULES, is_chain
from qrank.errors import FamilyError

MODEL = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
FILES = (MODULES, MODEL, TRANSFORMER)

_TASKS = {
    "Transformer": ("sequence-classification",),
    "LogitScore": ("text-generation", "any-to-any"),
    "Dense": ("feature-extraction",),
}
"""The last module -> what Transformer may be loaded for; `any-to-any` reads images, too."""

_OTHERS = ("model_kwargs", "model_args")
"""How weights are loaded: data type and device. The reference is computed in fp32 anyway."""

_OVERRIDES = ("config_kwargs", "config_args", "processor_kwargs", "tokenizer_args")
"""Options that would override keys of config.json and tokenizer_config.json."""

_HARMLESS = ("padding", "truncation", "return_tensors", "pad_to_multiple_of", "logits_to_keep")
"""Tokenizer options that do not change scores: qrank does its own padding and truncation."""


@dataclass(frozen=True)
class Metadata:
    """The content of the files; the defaults are for a checkpoint without them.

    Attributes:
        activation: class name of the activation of scores; None: not specified.
        prompt: text before a query, or the system message of a chat template; "": none.
        logit_score: folder of the LogitScore module; None: a score head.
        max_length: maximum number of tokens of a pair; None: not specified.
        chat: options of the chat template; None: prompts are made without it.
        structured: whether a message's content is a list of parts instead of a text.
        lower_case: whether text is lowercased, whatever the tokenizer does.
    """

    activation: str | None = None
    prompt: str = ""
    logit_score: str | None = None
    max_length: int | None = None
    chat: Mapping[str, Any] | None = None
    structured: bool = False
    lower_case: bool = False


@dataclass
class _Reader:
    """Reads the keys of one file and checks their types."""

    source: str
    name: str
    content: dict[str, Any] = field(default_factory=dict)

    def take(self, key: str, kinds: tuple[type, ...], expected: str, inside: str = "") -> Any:
        """A key's value; None if it is missing or null."""
        place = self.content
        for part in filter(None, inside.split(".")):
            place = place.get(part) or {}
        value = place.get(key)
        if value is not None and type(value) not in kinds:
            name = f"{inside}.{key}" if inside else key
            self.refuse(f"has {name} = {value!r}; expected {expected}")
        return value

    def refuse(self, why: str) -> None:
        raise FamilyError(f"{self.source}: {self.name} {why}")


def read_metadata(folder: Path, source: str) -> Metadata:
    """Read the files of a folder.

    Args:
        folder: the checkpoint's folder.
        source: the checkpoint's name in errors.

    Raises:
        FamilyError: they ask for something unsupported or cannot be understood.
        ConversionError: a file is not JSON of the expected type.
    """
    model = _Reader(source, MODEL, _optional(folder / MODEL, dict, source) or {})
    named = model.take("model_type", (str,), "a text such as 'CrossEncoder'")
    if named not in (None, "CrossEncoder"):
        # An embedding model's files: sentence-transformers itself ignores them for a reranker.
        return Metadata()
    activation = model.take("activation_fn", (str,), "the name of a class")
    prompt = _prompt(model)
    modules = _optional(folder / MODULES, list, source)
    if modules is None:
        return Metadata(activation=activation, prompt=prompt)
    names = _modules(_Reader(source, MODULES), modules)
    logit_score = modules[1]["path"] if names[-1] == "LogitScore" else None
    reader = _Reader(source, TRANSFORMER, _optional(folder / TRANSFORMER, dict, source) or {})
    expected = _TASKS[names[-1]]
    task = reader.take("transformer_task", (str,), "a text")
    if task is not None and task not in expected:
        reader.refuse(f"has transformer_task = {task!r}; expected {expected[0]!r} by {MODULES}")
    _check_options(reader)
    chat, structured = _chat(reader)
    return Metadata(
        activation=activation,
        prompt=prompt,
        logit_score=logit_score,
        max_length=_max_length(reader),
        chat=chat,
        structured=structured,
        lower_case=bool(reader.take("do_lower_case", (bool,), "true or false")),
    )


def _optional(path: Path, kind: type, source: str) -> Any:
    try:
        return read_json(path, kind, source)
    except FileNotFoundError:
        return None


def _prompt(model: _Reader) -> str:
    """The default prompt, used if the caller names none."""
    prompts = model.take("prompts", (dict,), "texts by name") or {}
    name = model.take("default_prompt_name", (str,), "the name of a prompt")
    if name is None:
        return ""
    if name not in prompts:
        model.refuse(
            f"has default_prompt_name = {name!r}, and prompts has: {', '.join(prompts) or 'none'}"
        )
    text = model.take(name, (str,), "a text", inside="prompts")
    return text or ""


def _modules(reader: _Reader, modules: list[Any]) -> list[str]:
    """The modules' names: Transformer alone, with LogitScore, or a chain that `module_chain` reads.

    Raises:
        FamilyError: other modules compute the score, or a folder is not where it is expected.
    """
    for module in modules:
        if not isinstance(module, dict) or not all(
            isinstance(module.get(key), str) for key in ("type", "path")
        ):
            reader.refuse(f"lists {module!r}; expected objects with a type and a path")
    kinds = [module["type"] for module in modules]
    names = [kind.rpartition(".")[2] for kind in kinds]
    if foreign := [kind for kind in kinds if not kind.startswith("sentence_transformers.")]:
        reader.refuse(f"has type = {foreign[0]!r}: code of its own, which qrank does not run")
    if not is_chain(names) and names not in (["Transformer"], ["Transformer", "LogitScore"]):
        reader.refuse(
            f"makes the score of the modules {', '.join(names) or '(none)'}; qrank reads "
            "Transformer alone, Transformer and LogitScore, or a chain of Transformer, Pooling and "
            "Dense"
        )
    places = [module["path"] for module in modules]
    if places[0]:
        reader.refuse(f"has the model in {places[0]!r}; expected it at the top of the folder")
    for name, place in zip(names[1:], places[1:], strict=True):
        if not place or Path(place).name != place:
            reader.refuse(f"has {name} in {place!r}; expected a folder beside it")
    return names


def _check_options(reader: _Reader) -> None:
    """Check that a Transformer's options change nothing that qrank does not read.

    Raises:
        FamilyError: an option does.
    """
    for key in _OVERRIDES:
        given = dict(reader.take(key, (dict,), "an object") or {})
        given.pop("trust_remote_code", None)
        given.pop("model_max_length", None)
        if given:
            reader.refuse(
                f"has {key} = {given!r}, which would replace what config.json or "
                "tokenizer_config.json say: write it there"
            )
    for key in _OTHERS:
        reader.take(key, (dict,), "an object")
    if named := reader.take("tokenizer_name_or_path", (str,), "a text"):
        reader.refuse(
            f"has tokenizer_name_or_path = {named!r}: copy that tokenizer into the checkpoint's "
            "folder, and delete the key"
        )
    options = reader.take("processing_kwargs", (dict,), "an object") or {}
    for part in options:
        given = reader.take(part, (dict,), "an object", inside="processing_kwargs") or {}
        known = (*_HARMLESS, "max_length")
        if part in ("text", "common") and (unknown := sorted(set(given) - set(known))):
            reader.refuse(
                f"has processing_kwargs.{part}.{unknown[0]} = {given[unknown[0]]!r}, which qrank "
                "does not know"
            )


def _chat(reader: _Reader) -> tuple[dict[str, Any] | None, bool]:
    """The chat template's options, and whether messages are lists of parts."""
    reader.take("modality_config", (dict,), "an object")
    message = reader.take("message", (dict,), "an object", inside="modality_config")
    if message is None:
        return None, False
    options = reader.take("chat_template", (dict,), "an object", inside="processing_kwargs")
    chat = dict(options or {})
    for key in (*_HARMLESS, "max_length", "restore_suffix"):
        chat.pop(key, None)
    return chat, message.get("format") == "structured"


def _max_length(reader: _Reader) -> int | None:
    """The smallest of the limits that the file names; None if it names none."""
    places = [("", "max_seq_length")]
    places += [
        (f"processing_kwargs.{k}", "max_length") for k in ("text", "common", "chat_template")
    ]
    places += [(key, "model_max_length") for key in ("processor_kwargs", "tokenizer_args")]
    found = [reader.take(key, (int,), "a whole number", inside=inside) for inside, key in places]
    limits = [limit for limit in found if limit is not None]
    if limits and min(limits) < 1:
        reader.refuse(f"limits a pair to {min(limits)} tokens")
    return min(limits, default=None)
