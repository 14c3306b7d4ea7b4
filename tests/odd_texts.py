"""Texts that normalizers and pre-tokenizers treat differently, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

_BLOCKS = (
    (0x0021, 0x007E),  # ASCII
    (0x00A1, 0x024F),  # Latin-1 and its extensions
    (0x0250, 0x02FF),  # IPA, modifier letters
    (0x0300, 0x036F),  # combining marks
    (0x0370, 0x052F),  # Greek, Cyrillic
    (0x0590, 0x06FF),  # Hebrew, Arabic
    (0x0900, 0x097F),  # Devanagari
    (0x0E00, 0x0E7F),  # Thai
    (0x1100, 0x11FF),  # Hangul, decomposed
    (0x1E00, 0x1FFF),  # Latin and Greek with more accents
    (0x2000, 0x206F),  # spaces, dashes, joiners, directions
    (0x2070, 0x218F),  # superscripts, letterlike, number forms
    (0x2200, 0x23FF),  # mathematics, technical
    (0x2460, 0x24FF),  # enclosed
    (0x3000, 0x30FF),  # CJK punctuation, kana
    (0x3300, 0x33FF),  # CJK compatibility
    (0x4E00, 0x4FFF),  # CJK
    (0xAC00, 0xAFFF),  # Hangul
    (0xE000, 0xE0FF),  # private use
    (0xF900, 0xFAFF),  # CJK compatibility ideographs
    (0xFB00, 0xFDFF),  # ligatures, Arabic forms
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFE50, 0xFFFD),  # small, full-width and half-width forms
    (0x1D400, 0x1D4FF),  # mathematical letters
    (0x1F300, 0x1FAFF),  # emoji
    (0x20000, 0x200FF),  # CJK beyond the first plane
)

_SPACES = (" ", "  ", "     ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u200b")

_CONTROLS = tuple(map(chr, (*range(32), *range(0x7F, 0xA0), 0xAD, 0x200E, 0x202E, 0xFEFF, 0xFFFD)))

WORDS = (
    *("planet", "Mars", "RED", "don't", "we'll", "naïve", "Ångström", "cafe\u0301", "E\u0301cole"),
    *("İstanbul", "straße", "ΣΊΣΥΦΟΣ", "ﬁne", "oﬃce", "Ⅻ", "½", "㎏", "①", "™", "…", "''", "``"),
    *("ＦＵＬＬ", "ｗｉｄｔｈ", "ｶﾀｶﾅ", "ガ", "カ\u3099", "火星", "日本語の文", "한국어", "한"),
    *("שָׁלוֹם", "مرحبا", "ﷺ", "لا", "मंगल", "สวัสดี", "\u202eabc\u202c", "▁", "▁▁a", "Ġ", "##s"),
    *(
        "👩‍🚀",
        "👨‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪",
        "❤️",
        "#️⃣",
        "3.14",
        "1,000",
        "$5",
        "a_b",
        "x-y",
        "C++",
    ),
    "https://example.org/a?b=%20c&d=ü#e",
    "user.name+tag@example.co.uk",
    "def f(x: int) -> str:\n    return f'{x!r}'\n",
    '<b class="x">1 < 2 && 3 > 2</b>',
    '{"key": [1, 2.5e-3, null]}',
    "C:\\Users\\x\\n.txt",
)


def odd_texts(count: int, seed: int = 18) -> list[str]:
    """As many different texts, without surrogates; some are empty or blank, a few are very long."""
    draw = random.Random(seed)
    kinds: list[Callable[[], str]] = [
        lambda: _of_one_block(draw),
        lambda: "".join(_of_one_block(draw) for _ in range(draw.randint(2, 5))),
        lambda: _mixed(draw, draw.randint(1, 8)),
        lambda: _mixed(draw, draw.randint(1, 30)),
        lambda: _marked(draw),
        lambda: draw.choice(_SPACES) * draw.randint(0, 4) + _mixed(draw, 2) + draw.choice(_SPACES),
        lambda: "".join(draw.choices([*_CONTROLS, *"ab "], k=draw.randint(1, 12))),
        lambda: _of_one_block(draw) * draw.randint(20, 200),
        lambda: "".join(map(chr, (_scalar(draw) for _ in range(draw.randint(1, 10))))),
    ]
    found = dict.fromkeys(["", " ", "x" * 40_000, "word " * 8_000, *WORDS])
    while len(found) < count:
        found[draw.choice(kinds)()] = None
    return list(found)[:count]


def _of_one_block(draw: random.Random) -> str:
    first, last = draw.choice(_BLOCKS)
    return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 8)))


def _mixed(draw: random.Random, parts: int) -> str:
    return "".join(draw.choice(draw.choice([WORDS, WORDS, _SPACES])) for _ in range(parts))


def _marked(draw: random.Random) -> str:
    """Letters with combining marks, in any order."""
    letters = (
        draw.choice("aeiouAEIOUnNсД") + "".join(chr(draw.randint(0x300, 0x36F)) for _ in range(n))
        for n in draw.choices(range(4), k=draw.randint(1, 8))
    )
    return "".join(letters)


def _scalar(draw: random.Random) -> int:
    """Any code point that is no surrogate."""
    number = draw.randrange(0x110000 - 0x800)
    return number if number < 0xD800 else number + 0x800
