"""A checkpoint's tokenizer -> one that knows text only.

Special tokens inside a query or document are plain text. A tokenizer offers several doors to
them, and `encode_special_tokens` of `tokenizers` shuts only one: added tokens that are not marked
special (Qwen's `<think>`) still come out as one id, and so do pieces of a Unigram vocabulary
(XLM-RoBERTa's `<s>`, `<pad>`, `<mask>`) even with the added tokens removed. Here all are shut.
"""

from __future__ import annotations

from typing import Any

from qrank.errors import ConversionError


def text_tokenizer(original: dict[str, Any]) -> dict[str, Any]:
    """Take everything but text out of a `tokenizer.json`.

    - Added tokens go, except runs of white space (ModernBERT's), which are text. Those get a place
      in the vocabulary: a library that finds none there counts anew, past what was removed.
    - Their pieces in the vocabulary are renamed to begin with a space. No text reaches them: every
      supported pre-tokenizer drops, splits at or replaces spaces. Ids stay as they are.
    - Template, truncation and padding go: they are the family's and qrank's.

    Raises:
        ConversionError: a model type whose vocabulary is not known here.
    """
    model = dict(original["model"])
    kept = [t for t in original["added_tokens"] if not t["content"].strip()]
    removed = {t["content"] for t in original["added_tokens"] if t["content"].strip()}
    # WordPiece and BPE find their unknown token by its name; Unigram by its number.
    reachable = removed - {model.get("unk_token")}
    if model["type"] in ("WordPiece", "BPE"):
        model["vocab"] = {_shut(p, reachable): number for p, number in model["vocab"].items()}
        model["vocab"] |= {t["content"]: t["id"] for t in kept}
    elif model["type"] == "Unigram":
        if beyond := [t["id"] for t in kept if t["id"] >= len(model["vocab"])]:
            raise ConversionError(f"the tokenizer adds white space beyond its pieces: ids {beyond}")
        model["vocab"] = [[_shut(piece, reachable), score] for piece, score in model["vocab"]]
    else:
        raise ConversionError(
            f"the tokenizer is a {model['type']} model; supported are: WordPiece, BPE, Unigram"
        )
    return {
        **original,
        "model": model,
        "added_tokens": kept,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _shut(piece: str, reachable: set[str]) -> str:
    return f" {piece}" if piece in reachable else piece
