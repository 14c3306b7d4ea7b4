"""Text -> token ids, with the bundle's tokenizer and without special tokens."""

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
"""Minimum number of characters for which several threads are worth the overhead."""


class TextTokenizer:
    """Tokenizes texts, long ones one window at a time. Safe to use from several threads.

    A bundle's tokenizer reads everything as plain text and cannot produce special tokens (see
    `qrank.converters.checkpoint.tokenizer`).
    """

    def __init__(self, tokenizer: Path | str, *, threads: int = 1) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: the bundle's tokenizer.json, or the text of one.
            threads: number of threads to tokenize many texts on; 1: the calling thread only.

        Raises:
            BundleError: it cannot be read.
        """
        # Imported here: `import qrank` should not have to load this native library.
        from tokenizers import Tokenizer
        from tokenizers.models import Unigram

        try:
            if isinstance(tokenizer, str):
                self._tokenizer = Tokenizer.from_str(tokenizer)
            else:
                self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{tokenizer} cannot be read: {error}") from error
        # Only WordPiece has this: up to that many tokens depend on where their word ends.
        word = getattr(self._tokenizer.model, "max_input_chars_per_word", 0)
        self._windows = Windows(
            self._tokens,
            margin=max(MARGIN, word),
            longest=self._longest if isinstance(self._tokenizer.model, Unigram) else None,
        )
        self._threads = threads

    def ids(self, texts: Sequence[str], most: int | None = None) -> list[Ids]:
        """Token ids of each text, without special tokens, the same as if read in one go.

        Surrogates, which no tokenizer accepts, become U+FFFD.

        Args:
            texts: of any length; long ones are passed to the tokenizer in parts.
            most: for a text with more tokens than this, the result may end anywhere beyond this
                many tokens. None: all tokens.
        """
        threads = min(self._threads, len(texts))
        if threads < 2 or sum(map(len, texts)) < _PARALLEL_FROM:
            return [self._read(text, most) for text in texts]
        # The library itself starts one thread per core. Each of our threads passes it one text at a
        # time, so that no more threads than ours work.
        with ThreadPoolExecutor(threads, "qrank-encode") as pool:
            shares = pool.map(
                lambda i: [self._read(text, most, share=True) for text in texts[i::threads]],
                range(threads),
            )
            found = dict(enumerate(shares))
        return [found[i % threads][i // threads] for i in range(len(texts))]

    def read(self, text: str, most: int | None = None) -> Tokens:
        """The tokens of one text with their character spans; `most` as for `ids`."""
        return self._windows.read(text, most)

    def _read(self, text: str, most: int | None, share: bool = False) -> Ids:
        """As `ids`, for one text; `share`: let other threads run meanwhile."""
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
        """Token ids of a text that is read in one go."""
        text = _clean(text)
        if share:
            (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        else:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32)

    def _longest(self) -> int:
        """Number of characters of the vocabulary's longest piece."""
        return max(map(len, self._tokenizer.get_vocab()))

    def _tokens(self, text: str) -> Tokens:
        """Tokens, with their character spans, of a text that is read in one go."""
        text = _clean(text)
        if self._threads > 1 and len(text) >= _PARALLEL_FROM:
            # Like `encode`, but lets other threads run meanwhile.
            (found,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        else:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        spans = np.array(found.offsets, np.int32).reshape(-1, 2)
        return Tokens(np.array(found.ids, np.int32), spans)


def _clean(text: str) -> str:
    # Replaces one character by one, so that positions in the text do not change.
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
