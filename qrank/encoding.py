"""Text -> token ids, with the bundle's one tokenizer; what gives way when a text is too long."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.errors import BundleError, InputError
from qrank.family import Family
from qrank.work import Ids, Segments

log = logging.getLogger("qrank")

CHUNK_TOKENS = 3000
"""Longest chunk of a long document; shorter where the model's limit is."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_PARALLEL_FROM = 20_000
"""Characters from which tokenizing on several threads pays for waking them."""


@dataclass(frozen=True)
class Part:
    """Characters `start` to `end` of a document, as token ids."""

    ids: Ids
    start: int
    end: int


class Encoder:
    """Makes a model's input of a query and a document. Safe to use from several threads.

    The tokenizer of a bundle knows text only: no special token has a way in (see
    `qrank.converters.tokenizer`), and special tokens come from the family's template alone.
    """

    def __init__(
        self,
        tokenizer: Path | str,
        family: Family,
        *,
        max_length: int | None = None,
        threads: int = 1,
    ) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: the bundle's tokenizer.json, or the text of one.
            family: the bundle's family.
            max_length: tokens a pair may have, special tokens included; None: the model's limit.
            threads: 1 keeps tokenizing on the calling thread.

        Raises:
            InputError: `max_length` is beyond the model's limit, or leaves no room for text.
            BundleError: the tokenizer cannot be read.
        """
        # Here, not above: a native library that `import qrank` need not wait for.
        from tokenizers import Tokenizer

        special = sum(isinstance(item, int) for item in family.template)
        limit = family.max_length if max_length is None else max_length
        if not special + 2 <= limit <= family.max_length:
            raise InputError(
                f"max_length is {limit}; this model reads {special + 2} to "
                f"{family.max_length} tokens"
            )
        try:
            if isinstance(tokenizer, str):
                self._tokenizer = Tokenizer.from_str(tokenizer)
            else:
                self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{tokenizer} cannot be read: {error}") from error
        self._family = family
        self._threads = threads
        self._text_limit = limit - special

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, whole and without special tokens.

        Surrogates, which no tokenizer takes, become U+FFFD.
        """
        clean = [_clean(text) for text in texts]
        if self._threads == 1 or sum(map(len, clean)) < _PARALLEL_FROM:
            encodings = (self._tokenizer.encode(t, add_special_tokens=False) for t in clean)
        else:
            encodings = iter(self._tokenizer.encode_batch_fast(clean, add_special_tokens=False))
        return [np.array(e.ids, np.int32) for e in encodings]

    def query(self, text: str) -> Ids:
        """Token ids of a query.

        A query that alone fills the limit is cut, with a warning, to three quarters of it: the
        last quarter stays for the document, or all documents would score alike.
        """
        (ids,) = self.ids([text])
        if len(ids) < self._text_limit:
            return ids
        kept = max(self._text_limit * 3 // 4, 1)
        log.warning(
            "the query has %d tokens, and query and document together may have %d: "
            "only its first %d are read",
            len(ids),
            self._text_limit,
            kept,
        )
        return ids[:kept]

    def room(self, query: Ids) -> int:
        """Tokens a document may have beside a query, 1 or more."""
        return self._text_limit - len(query)

    def pair(self, query: Ids, document: Ids) -> tuple[Ids, Segments | None]:
        """One model input, special tokens included, with its token types.

        The document must fit: at most `room(query)` tokens.
        """
        slots = {"query": query, "document": document}
        items = [
            np.array([item], np.int32) if isinstance(item, int) else slots[item]
            for item in self._family.template
        ]
        segments = self._family.segments
        return np.concatenate(items), (
            None
            if segments is None
            else np.repeat(np.array(segments, np.int8), [len(item) for item in items])
        )

    def chunks(self, text: str, room: int) -> list[Part]:
        """Cut a document into overlapping parts of at most `room` (and CHUNK_TOKENS) tokens.

        Neighbours share an eighth, so that no sentence is only ever seen cut.
        """
        encoding = self._tokenizer.encode(_clean(text), add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        size = min(room, CHUNK_TOKENS)
        step = size - size // 8
        starts = range(0, max(len(ids) - size, 0) + step, step)
        return [
            Part(
                ids[start : start + size],
                encoding.offsets[start][0] if len(ids) else 0,
                encoding.offsets[min(start + size, len(ids)) - 1][1] if len(ids) else 0,
            )
            for start in starts
        ]


def _clean(text: str) -> str:
    # One character for one, so that places in the text stay what they are.
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
