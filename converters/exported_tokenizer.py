"""A bundle's tokenizer -> one with special tokens and the pair's template, as other programs read.

A bundle's tokenizer.json knows text only (`checkpoint/tokenizer.py`), because qrank puts the
template together itself. Other programs find everything in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qrank.bundle.description import Description
from qrank.bundle.family import Family
from qrank.converters.checkpoint.ids import PROBE_TOKENS, encode_pairs
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.errors import ConversionError


def whole_tokenizer(
    text_only: dict[str, Any], family: Family, description: Description
) -> Tokenizer:
    """The inverse of `checkpoint.tokenizer.strip_special_tokens`, with the family's template.

    Truncation is `LongestFirst`, as every program that sets its own does: like qrank it only cuts
    the document, unless the query fills more than half of the model's limit by itself.

    Args:
        text_only: the bundle's tokenizer.json.
        family: the bundle's.
        description: the bundle's.

    Raises:
        ConversionError: a token of the template has no name, or ids cannot be kept.
    """
    added = description.added_tokens
    words = {token["content"] for token in text_only["added_tokens"]}
    control = {token["content"] for token in added} - words
    made = {
        **text_only,
        "model": _with_pieces(text_only["model"], control),
        "added_tokens": added,
        "post_processor": _template(family, {t["id"]: t["content"] for t in added}),
        "truncation": {
            "direction": "Right",
            "max_length": family.max_length,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": pad_id(description),
            "pad_type_id": 0,
            "pad_token": description.special["pad"],
        },
    }
    tokenizer = Tokenizer.from_str(json.dumps(made))
    if moved := [t["content"] for t in added if tokenizer.token_to_id(t["content"]) != t["id"]]:
        raise ConversionError(f"the id of the token {moved[0]!r} cannot be kept in tokenizer.json")
    return tokenizer


def pad_id(description: Description) -> int:
    """The id of the token that other programs pad with.

    Raises:
        ConversionError: the checkpoint names none.
    """
    name = description.special.get("pad")
    for token in description.added_tokens:
        if token["content"] == name:
            number: int = token["id"]
            return number
    raise ConversionError(
        "the checkpoint's tokenizer names no pad_token, with which other programs make batches: "
        "set it there and convert the checkpoint again"
    )


def check(tokenizer: Tokenizer, text_only: Path, family: Family) -> None:
    """Check that a tokenizer reads the probe pairs as qrank does, long documents cut.

    Args:
        tokenizer: from `whole_tokenizer`.
        text_only: the bundle's tokenizer.json.
        family: the bundle's.

    Raises:
        ConversionError: a pair has other ids or token types.
    """
    limit = min(family.max_length, PROBE_TOKENS)
    theirs = Tokenizer.from_str(tokenizer.to_str())
    theirs.enable_truncation(limit)
    pairs = [
        (query, document)
        for query, document in probe_pairs()
        if len(theirs.encode(query, add_special_tokens=False)) < limit // 4
    ]
    ours = encode_pairs(pairs, text_only, family)
    for place, (query, document) in enumerate(pairs):
        found, ids = theirs.encode(query, document), ours.ids[place].tolist()
        types = None if ours.segments is None else ours.segments[place].tolist()
        if found.ids != ids or types not in (None, found.type_ids):
            raise ConversionError(
                f"the exported tokenizer reads {query!r}, {document[:40]!r} as other ids than "
                f"qrank: {found.ids} and {ids}"
            )


def _with_pieces(model: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """A model whose pieces of control tokens have their own names again."""

    def named(piece: str) -> str:
        return piece[1:] if piece[:1] == " " and piece[1:] in control else piece

    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {**model, "vocab": [[named(piece), score] for piece, score in vocabulary]}
    return {**model, "vocab": {named(piece): number for piece, number in vocabulary.items()}}


def _template(family: Family, names: dict[int, str]) -> dict[str, Any]:
    """The post-processor that puts one text or two into the family's template."""
    numbers = [item for item in family.template if isinstance(item, int)]
    if unnamed := [number for number in numbers if number not in names]:
        raise ConversionError(f"the token {unnamed[0]} of the template has no name")
    kinds = family.segments or (0,) * len(family.template)
    pair = [
        {"SpecialToken": {"id": names[item], "type_id": kind}}
        if isinstance(item, int)
        else {"Sequence": {"id": "A" if item == "{query}" else "B", "type_id": kind}}
        for item, kind in zip(family.template, kinds, strict=True)
    ]
    places = [place for place, item in enumerate(family.template) if isinstance(item, str)]
    behind = [{"SpecialToken": {**p["SpecialToken"], "type_id": 0}} for p in pair[places[1] + 1 :]]
    return {
        "type": "TemplateProcessing",
        "single": [*pair[: places[0] + 1], *behind],
        "pair": pair,
        "special_tokens": {
            names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]}
            for number in numbers
        },
    }
