"""Split a text in any script into words for BM25."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3100-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
)
"""Letters of scripts that put no space between words."""


def words(text: str) -> list[str]:
    """The words of a text in lower case, one-letter words left out.

    Splits like bm25s and scikit-learn, with two exceptions. Marks (vowel signs of Devanagari, Thai,
    ...) belong to their letters. Text in a script without spaces becomes its single letters and all
    pairs of adjacent letters, after J.-Y. Nie, J. Gao, J. Zhang and M. Zhou, "On the use of words
    and n-grams for Chinese information retrieval", IRAL 2000; so does Korean, whose spaces separate
    phrases.
    """
    if text.isascii():
        return re.findall(r"\b\w\w+\b", text.lower())
    whole, parts = _patterns()
    text = unicodedata.normalize("NFKC", text).lower()
    return [word for stretch in whole.findall(text) for word in _cut(stretch, parts)]


def _cut(stretch: str, parts: re.Pattern[str]) -> Iterator[str]:
    """The words of an unbroken stretch of letters, digits and marks."""
    for unspaced, spaced in parts.findall(stretch):
        if len(spaced) > 1:
            yield spaced
        if unspaced:
            letters = _letters().findall(unspaced)
            yield from letters
            yield from map("".join, pairwise(letters))


@cache
def _letters() -> re.Pattern[str]:
    """A letter and its marks."""
    return re.compile(f".[{_marks()}]*", re.DOTALL)


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns: a stretch of letters, digits and marks; its unspaced or (group 2) spaced parts."""
    marks = _marks()
    unspaced = f"{_UNSPACED}\uac00-\ud7a3"
    return (
        re.compile(rf"\w[\w{marks}]*"),
        re.compile(f"([{unspaced}][{unspaced}{marks}]*)|([^{unspaced}]+)"),
    )


@cache
def _marks() -> str:
    """All marks, as the inside of a character class; Python's \\w does not match them."""
    found = [
        code
        for block in (range(0x300, 0x20000), range(0xE0100, 0xE01F0))
        for code in block
        if unicodedata.category(chr(code)).startswith("M")
    ]
    return "".join(map(chr, found))
