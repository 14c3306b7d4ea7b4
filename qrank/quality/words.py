"""What BM25 takes for words, in whatever script a text is written."""

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

    As bm25s and scikit-learn cut it, but that marks (vowel signs of Devanagari, Thai, ...) belong
    to their letters, and that a stretch of a script without spaces is every letter and every two
    neighbours of it, after J.-Y. Nie, J. Gao, J. Zhang and M. Zhou, "On the use of words and
    n-grams for Chinese information retrieval", IRAL 2000. Korean, whose spaces part phrases, is cut
    like these.
    """
    if text.isascii():
        return re.findall(r"\b\w\w+\b", text.lower())
    whole, parts = _patterns()
    text = unicodedata.normalize("NFKC", text).lower()
    return [word for stretch in whole.findall(text) for word in _cut(stretch, parts)]


def _cut(stretch: str, parts: re.Pattern[str]) -> Iterator[str]:
    """The words of letters, digits and marks between which nothing else stands."""
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
    """Stretches of letters, digits and marks; what of one is of unspaced scripts, and what not."""
    marks = _marks()
    unspaced = f"{_UNSPACED}\uac00-\ud7a3"
    return (
        re.compile(rf"\w[\w{marks}]*"),
        re.compile(f"([{unspaced}][{unspaced}{marks}]*)|([^{unspaced}]+)"),
    )


@cache
def _marks() -> str:
    """The inside of a character class of all marks; Python's \\w has none of them."""
    found = [
        code
        for block in (range(0x300, 0x20000), range(0xE0100, 0xE01F0))
        for code in block
        if unicodedata.category(chr(code)).startswith("M")
    ]
    return "".join(map(chr, found))
