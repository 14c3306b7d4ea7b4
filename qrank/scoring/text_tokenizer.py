"""Text -> token ids, with the bundle's tokenizer and without any special token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from qrank.bundle.sequences import Ids
from qrank.errors import BundleError
from qrank.scoring.windows import MARGIN, WINDOW, Tokens, Windows

_SURROGATE = re.compile("[\ud800-\udfff]")

_PARALLEL_FROM = 20_000
"""Characters from which tokenizing on several threads pays for waking them."""


class TextTokenizer:
    """Reads texts, long ones a window at a time. Safe to use from several threads.

    The tokenizer of a bundle knows text only: no special token has a way in (see
    `qrank.converters.checkpoint.tokenizer`).
    """

    def __init__(self, tokenizer: Path | str, *, threads: int = 1) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: the bundle's tokenizer.json, or the text of one.
            threads: that tokenize many texts; 1 keeps to the calling thread.

        Raises:
            BundleError: it cannot be read.
        """
        # Here, not above: a native library that `import qrank` need not wait for.
        from tokenizers import Tokenizer
        from tokenizers.models import Unigram

        try:
            if isinstance(tokenizer, str):
                self._tokenizer = Tokenizer.from_str(tokenizer)
            else:
                self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{tokenizer} cannot be read: {error}") from error
        # WordPiece's alone: up to so many tokens depend on where their word ends.
        word = getattr(self._tokenizer.model, "max_input_chars_per_word", 0)
        self._windows = Windows(
            self._tokens,
            margin=max(MARGIN, word),
            longest=self._longest if isinstance(self._tokenizer.model, Unigram) else None,
        )
        self._threads = threads

    def ids(self, texts: Sequence[str], most: int | None = None) -> list[Ids]:
        """Token ids of each text without special tokens, as of the text read at once.

        Surrogates, which no tokenizer takes, become U+FFFD.

        Args:
            texts: of any length; of a long one the tokenizer is given a part at a time.
            most: of a text with more tokens, at least one more than these is given. None: all are.
        """
        threads = min(self._threads, len(texts))
        if threads < 2 or sum(map(len, texts)) < _PARALLEL_FROM:
            return [self._read(text, most) for text in texts]
        # The library's own threads are as many as the machine has cores. It is given one text at a
        # time by each of ours, so no more than these work.
        with ThreadPoolExecutor(threads, "qrank-encode") as pool:
            shares = pool.map(
                lambda i: [self._read(text, most, share=True) for text in texts[i::threads]],
                range(threads),
            )
            found = dict(enumerate(shares))
        return [found[i % threads][i // threads] for i in range(len(texts))]

    def read(self, text: str, most: int | None = None) -> Tokens:
        """The tokens of one text with their characters; `most` as for `ids`."""
        return self._windows.read(text, most)

    def _read(self, text: str, most: int | None, share: bool = False) -> Ids:
        """As `ids`, of one text; `share`: let other threads run meanwhile."""
        if most is None:
            if len(text) > WINDOW:
                return self._windows.read(text).ids
            return self._ids(text, share)
        beginning = self._windows.beginning(text, most)
        ids = self._ids(beginning, share)
        if len(beginning) == len(text):
            return ids
        ids = ids[: self._windows.sure(beginning, ids)]
        return ids if len(ids) > most else self._windows.read(text, most).ids

    def _ids(self, text: str, share: bool) -> Ids:
        """Of a text that is read at once."""
        text = _clean(text)
        if share:
            (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        else:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32)

    def _longest(self) -> int:
        """Characters of the vocabulary's longest piece."""
        return max(map(len, self._tokenizer.get_vocab()))

    def _tokens(self, text: str) -> Tokens:
        """Likewise, with their places."""
        text = _clean(text)
        if self._threads > 1 and len(text) >= _PARALLEL_FROM:
            # As `encode`, but other threads run meanwhile.
            (found,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        else:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        spans = np.array(found.offsets, np.int32).reshape(-1, 2)
        return Tokens(np.array(found.ids, np.int32), spans)


def _clean(text: str) -> str:
    # One character for one, so that places in the text stay what they are.
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
