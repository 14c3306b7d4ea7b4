"""A long text's tokens, read window by window: memory grows with the window, not with the text.

A tokenizer takes 50 to 300 bytes per character of the text it is given, however few of the tokens
the model reads. Here it gets one window of the text at a time; the tokens are the same as those of
the whole text:

- The text after a window affects only the window's last tokens: BPE's merges, Unigram's best path
  and WordPiece's words look only a few tokens ahead. So the last `margin` tokens of a window are
  dropped; the next window supplies them. (Unigram looks further ahead in a word that repeats
  itself: see `Windows.sure`.)
- A window starts at the start of a token, twice `margin` tokens before the end of those used, and
  must reproduce the last AGREE of these. From a boundary that both windows share, each of the three
  algorithms continues as if it had read everything before. If two windows disagree, longer ones are
  tried, up to the whole text.
- A window may end in a stretch in which no token starts: WordPiece turns a word of any length into
  one unknown token, and white space into none. The next window then starts within that stretch. A
  token that fills the stretch continues there, as the same token.

If other characters that a tokenizer drops fill a window, longer windows are tried.
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
"""Characters per window."""

MARGIN = 128
"""Tokens dropped at a window's end; WordPiece makes fewer of a word: 100 with most vocabularies."""

AGREE = 32
"""Number of tokens of a window that the next one must reproduce."""

VARIED = 32
"""Text with more distinct characters than this in its last `margin` ones does not repeat itself."""

CHARACTERS_A_TOKEN = 8
"""Estimates the length of text from its tokens; English has 5, other scripts have fewer."""


class Tokens(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: shape [n].
        spans: characters [start, end) of each; shape [n, 2].
    """

    ids: Ids
    spans: NDArray[np.int32]

    def take(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` up to, not including, `stop`."""
        return Tokens(self.ids[start:stop], self.spans[start:stop])


_NONE = Tokens(np.empty(0, np.int32), np.empty((0, 2), np.int32))


class Windows:
    """Reads texts with a tokenizer. Safe to use from several threads if `encode` is."""

    def __init__(
        self,
        encode: Callable[[str], Tokens],
        *,
        margin: int = MARGIN,
        window: int = WINDOW,
        longest: Callable[[], int] | None = None,
    ) -> None:
        """Set the tokenizer.

        Args:
            encode: a whole text -> its tokens.
            margin: number of last tokens of a text that may change if more text follows.
            window: characters given to `encode` at a time.
            longest: for a Unigram model, returns the characters of its longest piece; else None.
        """
        self._encode = encode
        self._longest = longest
        self._margin = margin
        self._window = window
        self._long = max(window // 8, 4 * margin)

    def beginning(self, text: str, tokens: int) -> str:
        """A beginning of a text, probably long enough to determine its first `tokens` tokens."""
        return text[: _cut(text, (tokens + self._margin) * CHARACTERS_A_TOKEN)]

    def sure(self, beginning: str, ids: Ids) -> int:
        """How many of a beginning's first tokens stay the same, whatever text follows."""
        sure = max(len(ids) - self._margin, 0)
        last = beginning[-self._margin :]
        if self._longest is None or len(set(last)) > VARIED or " " in last:
            return sure
        # In a word that repeats itself, more text may change the best path from the first token on.
        # Any path has a token boundary at one of the last positions, as many as the longest piece
        # has characters. So the tokens that the best paths to all of these share are certain.
        for fewer in range(1, self._longest()):
            other = self._encode(beginning[:-fewer]).ids[:sure]
            differ = np.flatnonzero(ids[: len(other)] != other)
            sure = int(differ[0]) if len(differ) else min(sure, len(other))
        return sure

    def read(self, text: str, most: int | None = None) -> Tokens:
        """The tokens of a text; if it has more than `most`, maybe not all, but more than `most`.

        Args:
            text: without surrogates.
            most: None: read all tokens.
        """
        window = self._window
        while (found := self._read(text, window, most)) is None:
            window *= 4
        return found

    def _read(self, text: str, window: int, most: int | None) -> Tokens | None:
        """As `read`, with windows of one length; None if longer ones are needed."""
        # Grown in place: joining arrays at the end would hold everything twice.
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
        """What fills a window's end if no token starts there: "token" or "blank"; otherwise ""."""
        begins, ends = found.spans[-1] if len(found.ids) else (start, start)
        if begins > end - self._long:
            return ""
        if ends > end - self._long // 4:
            return "token"
        blank = text[ends:end]
        # Tested between two words: some tokenizers drop white space only at the end of a text.
        if not blank.isspace() or len(self._encode(f"a{blank}a").ids) > 2 * len(
            self._encode("a").ids
        ):
            return ""
        return "blank"


def _repeated(known: Tokens, found: Tokens) -> int | None:
    """Index after the known tokens in a window that reproduces them; None if it does not."""
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
    """As `_repeated`, for a window that starts within the one known token."""
    if not len(found.ids) or found.ids[0] != known.ids[0]:
        return None
    # The window starts half of `Windows._long` before the other one's end.
    begins, ends = found.spans[0]
    return 1 if ends >= known.spans[0, 1] > begins else None


def _cut(text: str, place: int) -> int:
    """Move a cut forward past combining characters.

    Normalization may reorder these, or merge them with the character before.
    """
    while place < len(text) and unicodedata.combining(text[place]):
        place += 1
    return min(place, len(text))
