"""A checkpoint's tokenizer -> one that knows text only.

Text is never control: a special token inside a query or document is read as the characters it is
spelled with. A tokenizer offers several doors to its special tokens, and `encode_special_tokens` of
`tokenizers` shuts only one: added tokens that are not marked special (Qwen's `<think>`) still come
out as one id, and so do pieces of a Unigram vocabulary (XLM-RoBERTa's `<s>`, `<pad>`, `<mask>`)
even with the added tokens removed. Here all are shut.

Other added tokens are words: somebody gave the model a token for a name, an HTML tag (Gemma) or a
run of spaces (ModernBERT). Text must reach those, or it is read in other pieces than in training.
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
"""`<|im_start|>`, and DeepSeek's with wide bars: the form of control tokens in chat models."""

_CHAT_MARKUP = re.compile(r"</?(?:think|tool_call|tool_response)>")
"""Qwen's. Not marked special, so that answers show it; not every checkpoint has a chat template."""

_BRACKETED = re.compile(r"[<\[{|]\S+[>\]}|]")
"""What may be control. Words of a language that a template happens to hold are not."""


def is_control(text: str, special: bool, templates: Iterable[str] = ()) -> bool:
    """Whether an added token steers the model, so that no text may become it.

    It is control if it is marked special, if it has the form `<|...|>`, if it is chat markup of
    Qwen's, or if it stands in brackets of any kind and a prompt is made with it. Every other added
    token is a word. White space always is.

    Args:
        text: how the token is spelled.
        special: whether it is marked so.
        templates: the prompts: items of the card's template, and the tokenizer's chat templates.
    """
    if not text.strip():
        return False
    if special or _MARKER.fullmatch(text) or _CHAT_MARKUP.fullmatch(text):
        return True
    return bool(_BRACKETED.fullmatch(text)) and any(text in template for template in templates)


def strip_special_tokens(
    original: dict[str, Any], control: Collection[str] | None = None
) -> dict[str, Any]:
    """Take everything but text out of a `tokenizer.json`.

    - Control tokens go. Their pieces in the vocabulary are renamed to begin with a space. No text
      reaches them: every supported pre-tokenizer drops, splits at or replaces spaces.
    - Words stay, with their flags (`lstrip`, `rstrip`, `single_word`, `normalized`).
    - Ids stay as they are.
    - Template, truncation and padding go: they are the family's and qrank's.

    Args:
        original: the checkpoint's.
        control: added tokens that are control; None: by `is_control`, without templates.

    Raises:
        ConversionError: a model type whose vocabulary is not known here, or ids cannot stay.
    """
    added = original["added_tokens"]
    if control is None:
        control = {t["content"] for t in added if is_control(t["content"], t["special"])}
    model = dict(original["model"])
    if model["type"] not in ("WordPiece", "BPE", "Unigram"):
        raise ConversionError(
            f"the tokenizer is a {model['type']} model; supported are: WordPiece, BPE, Unigram"
        )
    # WordPiece and BPE find their unknown token by its name; Unigram by its number.
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
    """See that words behind the vocabulary keep their ids without the control tokens among them.

    tokenizers counts such words from the vocabulary's size on, whatever id a file gives them. So
    the control tokens before the first word get a place in the vocabulary. Where control tokens lie
    between words, the words themselves do, if the model cannot come upon them there.

    Args:
        made: the text tokenizer; its vocabulary is changed.
        behind: added tokens that the original's vocabulary does not hold.
        control: contents of those that are control.

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
        # Nothing merges to it, and it is no character to begin with.
        return not model.get("ignore_merges") and len(token["content"]) > 1
    # Longest match first would find it in any word that begins so.
    return model["type"] == "WordPiece" and token["normalized"] and not token["single_word"]


def _ids_are_kept(made: Mapping[str, Any]) -> bool:
    tokenizer = Tokenizer.from_str(json.dumps(made))
    return all(tokenizer.token_to_id(t["content"]) == t["id"] for t in made["added_tokens"])
