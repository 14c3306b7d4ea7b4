"""Text -> token ids, with the bundle's one tokenizer; what gives way when a text is too long."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.errors import BundleError, InputError
from qrank.family import Family, fill
from qrank.work import Ids, Segments

log = logging.getLogger("qrank")

CHUNK_TOKENS = 3000
"""Longest chunk of a long document; shorter where the model's limit is."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_PARALLEL_FROM = 20_000
"""Characters from which tokenizing on several threads pays for waking them."""


@dataclass(frozen=True)
class Part:
    """Characters `start` to `end` of a document, as token ids of the template's document item."""

    ids: Ids
    start: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """A query in the family's template, ready for documents.

    Attributes:
        prefix: token ids that every document's sequence begins with. Empty for encoder families,
            which read everything at once.
        items: what follows; None is the document's place.
        lead: text in front of the document that is tokenized with it.
        room: tokens that a document may have with its lead.
    """

    prefix: Ids
    items: tuple[Ids | None, ...]
    lead: str
    room: int


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
            max_length: tokens a pair may have, the template's included; None: the model's limit.
            threads: 1 keeps tokenizing on the calling thread.

        Raises:
            InputError: `max_length` is beyond the model's limit, or leaves no room for text.
            BundleError: the tokenizer cannot be read.
        """
        # Here, not above: a native library that `import qrank` need not wait for.
        from tokenizers import Tokenizer

        try:
            if isinstance(tokenizer, str):
                self._tokenizer = Tokenizer.from_str(tokenizer)
            else:
                self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{tokenizer} cannot be read: {error}") from error
        self._family = family
        self._threads = threads
        self.limit = family.max_length if max_length is None else max_length
        least = self._template_length(None) + 2
        if not least <= self.limit <= family.max_length:
            raise InputError(
                f"max_length is {self.limit}; this model reads {least} to "
                f"{family.max_length} tokens"
            )

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

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """A query, and an instruction where the family takes one, in the template.

        A query that alone fills the limit is cut, with a warning, to three quarters of what the
        template leaves: the last quarter stays for the document, or all would score alike.

        Raises:
            InputError: the family takes no instruction, or it leaves no room for text.
        """
        template_length = self._template_length(instruction)
        room = self.limit - template_length
        if room < 2:
            raise InputError(
                f"the instruction leaves {max(room, 0)} of {self.limit} tokens for query and "
                "document"
            )
        items = self._fill(query, instruction)
        found = _length(items) - template_length
        if found >= room:
            kept = max(room * 3 // 4, 1)
            log.warning(
                "the query has %d tokens, and query and document together may have %d: "
                "only its first %d are read",
                found,
                room,
                kept,
            )
            items = self._fill_cut(query, instruction, kept)
        place = [item is None for item in items].index(True)
        shared = place if self._family.decoder else 0
        return Prompt(
            prefix=_joined(items[:shared]),
            items=tuple(items[shared:]),
            lead=self._lead(instruction),
            room=self.limit - _length(items),
        )

    def documents(self, texts: Sequence[str], instruction: str | None = None) -> list[Ids]:
        """Token ids of whole documents with what leads to them; the first `Prompt.room` fit."""
        lead = self._lead(instruction)
        return self.ids([lead + text for text in texts])

    def pair(self, prompt: Prompt, document: Ids) -> tuple[Ids, Segments | None]:
        """What follows the prompt's prefix for a document that fits, with its token types."""
        items = [document if item is None else item for item in prompt.items]
        segments = self._family.segments
        return _joined(items), (
            None
            if segments is None
            else np.repeat(np.array(segments, np.int8), [len(item) for item in items])
        )

    def whole(
        self, query: str, document: str, instruction: str | None = None
    ) -> tuple[Ids, Segments | None]:
        """One pair's whole input, cut to fit: what the model reads, with its token types."""
        prompt, (ids,) = self.prompt(query, instruction), self.documents([document], instruction)
        sequence, types = self.pair(prompt, ids[: prompt.room])
        return np.concatenate((prompt.prefix, sequence)), types

    def room(self, prompt: Prompt, tokens: int | None) -> int:
        """Tokens that a document may have with its lead, where at most `tokens` of it are read."""
        if tokens is None:
            return prompt.room
        lead = len(self.ids([prompt.lead])[0]) if prompt.lead else 0
        return min(prompt.room, lead + tokens)

    def end(self, text: str, prompt: Prompt, room: int) -> Ids:
        """Token ids of what leads to a document and of its end, `room` tokens in all."""
        ids, _, leading = self._led(text, prompt)
        return np.concatenate((ids[:leading], ids[leading:][max(len(ids) - room, 0) :]))

    def chunks(self, text: str, prompt: Prompt, limit: int | None = None) -> list[Part]:
        """Cut a document into overlapping parts of at most `prompt.room` (or CHUNK_TOKENS) tokens.

        Neighbours share an eighth, so that no sentence is only ever seen cut. What leads to the
        document stands in front of each. Of the document at most `limit` tokens are read.
        """
        lead = len(prompt.lead)
        ids, offsets, leading = self._led(text, prompt)
        if limit is not None:
            ids = ids[: leading + limit]
        size = max(min(prompt.room, CHUNK_TOKENS) - leading, 1)
        step = size - size // 8
        starts = range(leading, max(len(ids) - size, leading) + step, step)
        return [
            Part(
                np.concatenate((ids[:leading], ids[start : start + size])),
                max(offsets[start][0] - lead, 0) if start < len(ids) else 0,
                max(offsets[min(start + size, len(ids)) - 1][1] - lead, 0) if len(ids) else 0,
            )
            for start in starts
        ]

    def _led(self, text: str, prompt: Prompt) -> tuple[Ids, list[tuple[int, int]], int]:
        """Ids and offsets of a document behind its lead, and how many are the lead's alone."""
        encoding = self._tokenizer.encode(_clean(prompt.lead + text), add_special_tokens=False)
        # A token of the lead and the document's beginning is the document's.
        lead = len(prompt.lead)
        leading = sum(end <= lead for _, end in encoding.offsets) if lead else 0
        return np.array(encoding.ids, np.int32), encoding.offsets, leading

    def _fill(self, query: str, instruction: str | None) -> list[Ids | None]:
        """The template's items as token ids; None for the document's."""
        template, text = self._family.asked(instruction)
        texts = [
            "" if isinstance(item, int) else fill(item, query=query, instruction=text)
            for item in template
        ]
        items: list[Ids | None] = list(self.ids(texts))
        for place, item in enumerate(template):
            if isinstance(item, int):
                items[place] = np.array([item], np.int32)
            elif "{document}" in item:
                items[place] = None
        return items

    def _fill_cut(self, query: str, instruction: str | None, kept: int) -> list[Ids | None]:
        """`_fill` with so many tokens of the query."""
        offsets = self._tokenizer.encode(_clean(query), add_special_tokens=False).offsets
        most = _length(self._fill("", instruction)) + kept
        # Text that is cut may come to more tokens than it was cut at.
        for count in range(min(kept, len(offsets)), 0, -1):
            items = self._fill(query[: offsets[count - 1][1]], instruction)
            if _length(items) <= most:
                return items
        return self._fill("", instruction)

    def _lead(self, instruction: str | None) -> str:
        """What stands before the document in its item; no query does."""
        template, text = self._family.asked(instruction)
        (item,) = (i for i in template if isinstance(i, str) and "{document}" in i)
        return fill(item, instruction=text, document="")

    def _template_length(self, instruction: str | None) -> int:
        """Tokens of the template without query and document."""
        (lead,) = self.ids([self._lead(instruction)])
        return _length(self._fill("", instruction)) + len(lead)


def _length(items: Sequence[Ids | None]) -> int:
    return sum(len(item) for item in items if item is not None)


def _joined(items: Sequence[Ids | None]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *(item for item in items if item is not None)])


def _clean(text: str) -> str:
    # One character for one, so that places in the text stay what they are.
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
