"""A card and a checkpoint's own files -> the family that scores it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrank.bundle.family import POOLINGS, Family
from qrank.converters.checkpoint.attention import rotary_limit
from qrank.converters.checkpoint.card import ROLES, Card
from qrank.converters.checkpoint.configuration import is_language_model, whole_number
from qrank.converters.checkpoint.sentence_transformers import MODEL, TRANSFORMER, Metadata
from qrank.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class Said:
    """What a checkpoint's files say about it.

    Attributes:
        source: the checkpoint's name in errors.
        config: its config.json.
        settings: the same with transformers' defaults.
        metadata: from sentence-transformers' files.
        tokenizer: transformers' tokenizer.
        control: its control tokens and their ids.
    """

    source: str
    config: Mapping[str, Any]
    settings: PretrainedConfig
    metadata: Metadata
    tokenizer: PreTrainedTokenizerBase
    control: Mapping[str, int]


def concrete(card: Card, said: Said) -> Family:
    """Fill in a card from what a checkpoint says.

    Raises:
        FamilyError: the two do not match, or the checkpoint needs something unsupported.
        ConversionError: a key of config.json is missing or of the wrong type.
    """
    architectures = said.config.get("architectures")
    if not architectures:
        raise FamilyError(
            f"{said.source}: config.json has architectures = {architectures!r}; expected the name "
            f"of transformers' class, such as {card.architectures[0]}"
        )
    numbers = {
        f"{{{role}}}": getattr(said.tokenizer, f"{role}_token_id")
        for role in ROLES
        if f"{{{role}}}" in card.template
    }
    if missing := [role.strip("{}") for role, number in numbers.items() if number is None]:
        names = ", ".join(f"{role}_token" for role in missing)
        raise FamilyError(f"{said.source}: tokenizer_config.json names no {names}")
    numbers |= said.control
    template, instructed = _prompted(card, said), card.instructed
    for item in (*template, *instructed):
        if item not in numbers and (held := [text for text in numbers if text in item]):
            raise FamilyError(
                f"card {card.name}: {item!r} holds the special token {held[0]}; make it an item"
            )
    compared = card.labels if is_language_model(dict(said.config)) else ()
    labels = [said.tokenizer(label, add_special_tokens=False)["input_ids"] for label in compared]
    if longer := [label for label, ids in zip(compared, labels, strict=True) if len(ids) != 1]:
        raise FamilyError(
            f"the label {longer[0]!r} of family {card.name} is no single token of this tokenizer"
        )

    def made(items: Iterable[str]) -> tuple[int | str, ...]:
        return tuple(numbers.get(item, item) for item in items)

    return Family(
        name=card.name,
        architecture=architectures[0],
        template=made(template),
        segments=_segments(card, said),
        max_length=_max_length(card, said),
        pooling=_pooling(card, said),
        activation=_activation(card, said),
        temperature=card.temperature,
        instruction=card.instruction,
        instructed=made(instructed) or None,
        labels=tuple(ids[0] for ids in labels),
        classes=card.classes,
    )


def _prompted(card: Card, said: Said) -> tuple[str, ...]:
    """A card's template with the prompt that sentence-transformers puts before every query.

    The prompt of a causal model is in its chat template or in the card's template.
    """
    prompt = said.metadata.prompt
    if card.pooling == "last":
        return card.template
    if said.metadata.chat is not None:
        raise FamilyError(
            f"{said.source}: {TRANSFORMER} asks with a chat template (modality_config has message),"
            f" and family {card.name} does not; give the right card with --family FILE.toml"
        )
    if not prompt:
        return card.template
    if "{query}" not in card.template or "{" in prompt:
        raise FamilyError(
            f"{said.source}: {MODEL} puts {prompt!r} before every query, which family {card.name} "
            "has no place for"
        )
    return tuple(f"{prompt}{item}" if item == "{query}" else item for item in card.template)


def _segments(card: Card, said: Said) -> tuple[int, ...] | None:
    """The token types of the template's items, as in the checkpoint's own tokenizer.

    If that returns no token types or only type 0, the model runs without them: this is equivalent.
    """
    if (getattr(said.settings, "type_vocab_size", 0) or 0) < 2:
        return None
    pair = said.tokenizer(["a"], ["a"])
    (types,) = pair.get("token_type_ids", [[]])
    if not any(types):
        return None
    (word,) = said.tokenizer(["a"], add_special_tokens=False)["input_ids"]
    expected = [
        kind
        for item, kind in zip(card.template, card.segments, strict=False)
        for _ in (word if item in ("{query}", "{document}") else [0])
    ]
    if types != expected:
        raise FamilyError(
            f"{said.source}: its tokenizer gives the token types {types} to a pair, and family "
            f"{card.name} reads {expected or 'none'}; give the right card with --family FILE.toml"
        )
    return card.segments


def _max_length(card: Card, said: Said) -> int:
    limits = [card.max_length, said.metadata.max_length, rotary_limit(said.settings, said.source)]
    if getattr(said.settings, "max_position_embeddings", None) is not None:
        positions = whole_number(said.settings, "max_position_embeddings", said.source)
        if card.positions_after_pad:
            positions -= whole_number(said.settings, "pad_token_id", said.source, 0) + 1
        limits.append(positions)
    # transformers expresses "no limit" as a very large number.
    known = [limit for limit in limits if limit is not None]
    most = min([*known, int(said.tokenizer.model_max_length)])
    if not known and most > _NO_LIMIT:
        raise FamilyError(
            f"{said.source}: neither max_position_embeddings in config.json nor model_max_length "
            "in tokenizer_config.json says how many tokens the model reads"
        )
    if most < _LEAST:
        raise FamilyError(
            f"{said.source} reads {most} tokens, by max_position_embeddings in config.json, "
            f"model_max_length in tokenizer_config.json or max_seq_length in {TRANSFORMER}; "
            f"expected {_LEAST} or more"
        )
    return most


_NO_LIMIT = 10**9
_LEAST = 32
"""Minimum number of tokens for a query and a document; a smaller limit is a mistake."""


def _pooling(card: Card, said: Said) -> str:
    if card.pooling in POOLINGS:
        return card.pooling
    value = getattr(said.settings, card.pooling, None)
    if value not in POOLINGS:
        raise FamilyError(
            f"config.json has {card.pooling} = {value!r}; supported are: {', '.join(POOLINGS)}"
        )
    pooling: str = value
    return pooling


def _activation(card: Card, said: Said) -> str:
    """The activation that the checkpoint names, or else the card's.

    sentence-transformers writes its own file since 5.4, and keys of config.json before.
    """
    legacy = "sbert_ce_default_activation_function"
    own = said.config.get("sentence_transformers") or {}
    places = [(MODEL, "activation_fn", said.metadata.activation)]
    if "activation_fn" in own:
        places.append(("config.json", "activation_fn", own["activation_fn"]))
    else:
        places.append(("config.json", legacy, said.config.get(legacy)))
    for file, key, named in places:
        if named is None:
            continue
        if not isinstance(named, str) or named not in _ACTIVATIONS:
            raise FamilyError(
                f"{said.source}: {file} names the activation {named!r} ({key}); supported are: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[named]
    return card.activation


def check_case(said: Said) -> None:
    """Check that the tokenizer lowercases text if sentence-transformers does.

    Raises:
        FamilyError: sentence-transformers lowercases text, but the tokenizer is case-sensitive.
    """
    if not said.metadata.lower_case:
        return
    for text in ("Mars ORBITS the Sun", "ÅNGSTRÖM"):
        upper, lower = (
            said.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, text.lower())
        )
        if upper != lower:
            raise FamilyError(
                f"{said.source}: {TRANSFORMER} has do_lower_case = true, and its tokenizer.json "
                "does not: add a normalizer of type Lowercase there"
            )
