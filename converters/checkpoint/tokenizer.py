"""A checkpoint's tokenizer -> one that knows text only.

Text never becomes control: a special token inside a query or document is read as the characters it
is spelled with. A tokenizer can produce special tokens in several ways, and `encode_special_tokens`
of `tokenizers` prevents only one: added tokens that are not marked special (Qwen's `<think>`) still
become one id, and so do pieces of a Unigram vocabulary (XLM-RoBERTa's `<s>`, `<pad>`, `<mask>`)
even with the added tokens removed. This module prevents all of them.

Other added tokens are words: the model was given a token for a name, an HTML tag (Gemma) or a run
of spaces (ModernBERT). Text must reach those, or it is split differently than in training.
`is_control` tells the two apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from qrank.errors import ConversionError

_MARKER = re.compile(r"<[|\uff5c]\S+[|\uff5c]>")
"""`<|im_start|>`, or DeepSeek's with wide bars: the form of control tokens in chat models."""

_CHAT_MARKUP = re.compile(r"</?(?:think|tool_call|tool_response)>")
"""Qwen's. Not marked special, so that answers show it; some checkpoints lack a chat template."""

_BRACKETED = re.compile(r"[<\[{|]\S+[>\]}|]")
"""The form of tokens that may be control: natural-language words in a template are not."""


def is_control(text: str, special: bool, templates: Iterable[str] = ()) -> bool:
    """Whether an added token steers the model, so that no text may become it.

    It is control if it is marked special, has the form `<|...|>`, is Qwen's chat markup, or is in
    brackets of any kind and part of a prompt. Every other added token is a word. White space is
    always a word.

    Args:
        text: the token's spelling.
        special: whether the token is marked special.
        templates: the prompts: items of the card's template and the tokenizer's chat templates.
    """
    if not text.strip():
        return False
    if special or _MARKER.fullmatch(text) or _CHAT_MARKUP.fullmatch(text):
        return True
    return bool(_BRACKETED.fullmatch(text)) and any(text in template for template in templates)


def strip_special_tokens(
    original: dict[str, Any], control: Collection[str] | None = None
) -> dict[str, Any]:
    """Remove everything but text from a `tokenizer.json`.

    - Control tokens are removed. Their pieces in the vocabulary are renamed to begin with a space.
      No text reaches them: every supported pre-tokenizer drops, splits at or replaces spaces.
    - Words stay, with their flags (`lstrip`, `rstrip`, `single_word`, `normalized`).
    - Ids do not change.
    - Template, truncation and padding are removed: the family and qrank handle them.

    Args:
        original: the checkpoint's `tokenizer.json`.
        control: added tokens that are control; None: decide with `is_control`, without templates.

    Raises:
        ConversionError: the model type is not supported, or ids cannot be kept.
    """
    added = original["added_tokens"]
    if control is None:
        control = {t["content"] for t in added if is_control(t["content"], t["special"])}
    model = dict(original["model"])
    if model["type"] not in ("WordPiece", "BPE", "Unigram"):
        raise ConversionError(
            f"the tokenizer is a {model['type']} model; supported are: WordPiece, BPE, Unigram"
        )
    # WordPiece and BPE find their unknown token by its name, Unigram by its id.
    unreachable = set(control) - {model.get("unk_token")}
    words = [token for token in added if token["content"] not in control]
    made = {
        **original,
        "model": model,
        "added_tokens": words,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    if model["type"] == "Unigram":
        known = {piece for piece, _ in model["vocab"]}
        model["vocab"] = [[_guarded(piece, unreachable), score] for piece, score in model["vocab"]]
    else:
        known = set(model["vocab"])
        model["vocab"] = {_guarded(p, unreachable): number for p, number in model["vocab"].items()}
    behind = [token for token in added if token["content"] not in known]
    _keep_ids(made, behind, control)
    return made


def _guarded(piece: str, unreachable: Collection[str]) -> str:
    return f" {piece}" if piece in unreachable else piece


def _keep_ids(made: dict[str, Any], behind: list[dict[str, Any]], control: Collection[str]) -> None:
    """Keep the ids of words after the vocabulary when control tokens among them are removed.

    tokenizers numbers such words from the vocabulary's size on, whatever ids a file gives them. So
    the control tokens before the first word are put into the vocabulary. If control tokens lie
    between words, the words are put there instead, unless the model could then produce them itself.

    Args:
        made: the text tokenizer; its vocabulary is changed.
        behind: added tokens that are not in the original's vocabulary.
        control: contents of the control tokens.

    Raises:
        ConversionError: neither keeps the ids.
    """
    words = [token for token in behind if token["content"] not in control]
    if not words:
        return
    model, vocabulary = made["model"], made["model"]["vocab"]
    first = min(token["id"] for token in words)
    before = [t for t in behind if t["content"] in control and t["id"] < first]
    if isinstance(vocabulary, list):
        model["vocab"] = [*vocabulary, *([f" {t['content']}", 0.0] for t in before)]
    else:
        model["vocab"] = vocabulary | {f" {t['content']}": t["id"] for t in before}
    if _ids_are_kept(made):
        return
    if all(_unreachable(token, model) for token in words):
        model["vocab"] |= {token["content"]: token["id"] for token in words}
        if _ids_are_kept(made):
            return
    raise ConversionError(
        f"the tokenizer adds words ({words[0]['content']!r}) and control tokens by turns behind "
        f"its {model['type']} vocabulary, and the words' ids cannot be kept without the others"
    )


def _unreachable(token: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether the model finds a word in its vocabulary only where it is an added token anyway."""
    if model["type"] == "BPE":
        # No merge produces it, and it is not a single character.
        return not model.get("ignore_merges") and len(token["content"]) > 1
    # Longest match first finds it at the start of any word: the added token must match there too.
    return model["type"] == "WordPiece" and token["normalized"] and not token["single_word"]


def _ids_are_kept(made: Mapping[str, Any]) -> bool:
    tokenizer = Tokenizer.from_str(json.dumps(made))
    return all(tokenizer.token_to_id(t["content"]) == t["id"] for t in made["added_tokens"])
