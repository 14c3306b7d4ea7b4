"""A long text's tokens, read window by window: memory follows a window's length, not the text's.

A tokenizer takes fifty to three hundred bytes for each character of a text that it is given whole,
however few of its tokens a model reads. Here it is given a window of the text at a time, and the
tokens are those of the whole text:

- What follows a window changes only its last tokens: the merges of BPE, the best path of Unigram
  and the words of WordPiece look a few tokens ahead. So the last `margin` tokens of a window are
  not used; the next window gives them. (Unigram looks further in a word that repeats itself: see
  `Windows.sure`.)
- A window begins where a token begins, twice `margin` tokens before the last one used, and must
  repeat the last AGREE of those. From a boundary that both windows have, each of the three
  algorithms goes on as if it had read everything before it. Where two windows disagree, longer
  ones are tried, in the end the whole text.
- A window may end in a stretch in which no token begins: WordPiece makes one unknown token of a
  word of any length, and none of white space. The next window then begins in that stretch. A
  token that fills it goes on there, as the same token.

Other characters that a tokenizer drops, where they fill a window, make it try longer ones.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Ids

WINDOW = 1 << 15
"""Characters of a window."""

MARGIN = 128
"""Tokens, more than WordPiece makes of a word: 100 for most vocabularies."""

AGREE = 32
"""Tokens of a window that the next one must have too."""

VARIED = 32
"""Characters, of as many as MARGIN, that differ in text that does not repeat itself."""

CHARACTERS_A_TOKEN = 8
"""To guess how long a text of so many tokens is; English has 5, other scripts fewer."""


class Tokens(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: shape [n].
        spans: characters [start, end) of each; shape [n, 2].
    """

    ids: Ids
    spans: NDArray[np.int32]

    def take(self, start: int, stop: int) -> Tokens:
        """Those from one place to another."""
        return Tokens(self.ids[start:stop], self.spans[start:stop])


_NONE = Tokens(np.empty(0, np.int32), np.empty((0, 2), np.int32))


class Windows:
    """Reads texts with a tokenizer. Safe to use from several threads, as far as `encode` is."""

    def __init__(
        self,
        encode: Callable[[str], Tokens],
        *,
        margin: int = MARGIN,
        window: int = WINDOW,
        longest: Callable[[], int] | None = None,
    ) -> None:
        """Read with a tokenizer.

        Args:
            encode: a whole text -> its tokens.
            margin: tokens that what follows a text may change, at its end.
            window: characters given to `encode` at a time.
            longest: of a Unigram model, tells the characters of its longest piece.
        """
        self._encode = encode
        self._longest = longest
        self._margin = margin
        self._window = window
        self._long = max(window // 8, 4 * margin)

    def beginning(self, text: str, tokens: int) -> str:
        """A beginning of a text that probably shows so many of its tokens."""
        return text[: _cut(text, (tokens + self._margin) * CHARACTERS_A_TOKEN)]

    def sure(self, beginning: str, ids: Ids) -> int:
        """How many tokens of a beginning are the text's, whatever follows."""
        sure = max(len(ids) - self._margin, 0)
        last = beginning[-self._margin :]
        if self._longest is None or len(set(last)) > VARIED or " " in last:
            return sure
        # The best path through a word that repeats itself may be another from its first token on.
        # It comes by one of as many places as the longest piece is long: what all paths to these
        # have in common is its beginning.
        for fewer in range(1, self._longest()):
            other = self._encode(beginning[:-fewer]).ids[:sure]
            differ = np.flatnonzero(ids[: len(other)] != other)
            sure = int(differ[0]) if len(differ) else min(sure, len(other))
        return sure

    def read(self, text: str, most: int | None = None) -> Tokens:
        """The tokens of a text: all, or where it has more than `most`, one more than that or more.

        Args:
            text: without surrogates.
            most: None: all are wanted.
        """
        window = self._window
        while (found := self._read(text, window, most)) is None:
            window *= 4
        return found

    def _read(self, text: str, window: int, most: int | None) -> Tokens | None:
        """As `read`, in windows of one length; None where longer ones are needed."""
        # Grown in place: arrays that are joined at the end would be there twice.
        ids, spans = array("i"), array("i")
        known, start, stretch = _NONE, 0, ""
        while True:
            end = _cut(text, start + window)
            found = self._encode(text[start:end])
            found = Tokens(found.ids, found.spans + start)
            count = len(found.ids)
            new = _continued(known, found) if stretch == "token" else _repeated(known, found)
            if new is None:
                return None
            if stretch == "token":
                spans[-1] = int(found.spans[0, 1])
            last = end == len(text)
            stretch = "" if last else self._stretch(text, start, end, found)
            stop = count if last or stretch else self.sure(text[start:end], found.ids)
            if stop <= new and not last and not stretch:
                return None
            fresh = found.take(new, stop)
            ids.frombytes(fresh.ids.tobytes())
            spans.frombytes(fresh.spans.tobytes())
            if last or (most is not None and len(ids) > most):
                return Tokens(np.asarray(ids), np.asarray(spans).reshape(-1, 2))
            if stretch:
                known = found.take(count - 1, count) if stretch == "token" else _NONE
                start = _cut(text, end - self._long // 2)
            else:
                known = found.take(max(stop - 2 * self._margin, 0), stop)
                start = int(known.spans[0, 0])

    def _stretch(self, text: str, start: int, end: int, found: Tokens) -> str:
        """What fills the end of a window where no token begins: "token", "blank" or ""."""
        begins, ends = found.spans[-1] if len(found.ids) else (start, start)
        if begins > end - self._long:
            return ""
        if ends > end - self._long // 4:
            return "token"
        blank = text[ends:end]
        # Between words: at the end of a text some tokenizers drop what they do not drop elsewhere.
        if not blank.isspace() or len(self._encode(f"a{blank}a").ids) > 2 * len(
            self._encode("a").ids
        ):
            return ""
        return "blank"


def _repeated(known: Tokens, found: Tokens) -> int | None:
    """The place behind the known tokens in a window that begins with them; None: it does not."""
    agree = min(len(known.ids), AGREE)
    if agree == 0:
        return 0
    last = known.take(len(known.ids) - agree, len(known.ids))
    for place in np.flatnonzero((found.spans == last.spans[-1]).all(1)).tolist():
        same = found.take(max(place + 1 - agree, 0), place + 1)
        if np.array_equal(same.ids, last.ids) and np.array_equal(same.spans, last.spans):
            return int(place) + 1
    return None


def _continued(known: Tokens, found: Tokens) -> int | None:
    """Likewise, in a window that begins within the one known token."""
    if not len(found.ids) or found.ids[0] != known.ids[0]:
        return None
    # The window begins half a stretch before the other's end.
    begins, ends = found.spans[0]
    return 1 if ends >= known.spans[0, 1] > begins else None


def _cut(text: str, place: int) -> int:
    """The place, or the next one in front of a character that stands for itself.

    One that combines with what is before it may change places with others, or become one with it.
    """
    while place < len(text) and unicodedata.combining(text[place]):
        place += 1
    return min(place, len(text))
