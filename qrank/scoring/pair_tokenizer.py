"""A query and a document -> token ids in the template; what gives way where they are too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.bundle.family import Family, fill
from qrank.bundle.sequences import Ids, Segments
from qrank.errors import InputError
from qrank.scoring.text_tokenizer import TextTokenizer
from qrank.scoring.windows import MARGIN, WINDOW, Tokens

log = logging.getLogger("qrank")

CHUNK_TOKENS = 3000
"""Longest chunk of a long document; shorter where the model's limit is."""


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
        lead_in: text in front of the document that is tokenized with it.
        capacity: tokens that a document may have with its lead-in.
    """

    prefix: Ids
    items: tuple[Ids | None, ...]
    lead_in: str
    capacity: int


class PairTokenizer:
    """Makes a model's input of a query and a document. Safe to use from several threads.

    Special tokens come from the family's template alone: text gives none (`TextTokenizer`).
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
            threads: that tokenize many texts; 1 keeps to the calling thread.

        Raises:
            InputError: `max_length` is beyond the model's limit, or leaves no room for text.
            BundleError: the tokenizer cannot be read.
        """
        self._text = TextTokenizer(tokenizer, threads=threads)
        self._family = family
        self.limit = family.max_length if max_length is None else max_length
        least = self._template_length(None) + 2
        if not least <= self.limit <= family.max_length:
            raise InputError(
                f"max_length is {self.limit}; this model reads {least} to "
                f"{family.max_length} tokens"
            )

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text alone, without special tokens; see `TextTokenizer.ids`."""
        return self._text.ids(texts)

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
        shown = self._shown(query)
        items = self._fill(shown, instruction)
        found = _length(items) - template_length
        if found >= room:
            kept = max(room * 3 // 4, 1)
            log.warning(
                "the query has %s%d tokens, and query and document together may have %d: "
                "only its first %d are read",
                "" if shown == query else "more than ",
                found,
                room,
                kept,
            )
            items = self._fill_cut(shown, instruction, kept)
        place = [item is None for item in items].index(True)
        shared = place if self._family.decoder else 0
        return Prompt(
            prefix=_joined(items[:shared]),
            items=tuple(items[shared:]),
            lead_in=self._lead_in(instruction),
            capacity=self.limit - _length(items),
        )

    def documents(
        self, texts: Sequence[str], instruction: str | None = None, most: int | None = None
    ) -> list[Ids]:
        """Token ids of lead-in and document, as `ids`; of each, the first `Prompt.capacity` fit."""
        lead_in = self._lead_in(instruction)
        return self._text.ids([lead_in + text for text in texts], most)

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
        prompt = self.prompt(query, instruction)
        (ids,) = self.documents([document], instruction, prompt.capacity)
        sequence, types = self.pair(prompt, ids[: prompt.capacity])
        return np.concatenate((prompt.prefix, sequence)), types

    def capacity(self, prompt: Prompt, tokens: int | None) -> int:
        """`Prompt.capacity`, where of the document itself at most `tokens` are read."""
        if tokens is None:
            return prompt.capacity
        leading = len(self.ids([prompt.lead_in])[0]) if prompt.lead_in else 0
        return min(prompt.capacity, leading + tokens)

    def tail(self, text: str, prompt: Prompt, capacity: int) -> Ids:
        """Token ids of what leads to a document and of its end, `capacity` tokens in all.

        All of it is read: where its last tokens begin depends on those before.
        """
        (ids, _), leading = self._with_lead_in(text, prompt)
        return np.concatenate((ids[:leading], ids[leading:][max(len(ids) - capacity, 0) :]))

    def chunks(self, text: str, prompt: Prompt, limit: int | None = None) -> list[Part]:
        """Cut a document into overlapping parts.

        Each has at most `prompt.capacity` tokens, or CHUNK_TOKENS, and begins with what leads to
        the document. Neighbours share an eighth, so that no sentence is only ever seen cut. Of the
        document at most `limit` tokens are read.
        """
        offset = len(prompt.lead_in)
        (ids, spans), leading = self._with_lead_in(text, prompt, limit)
        if limit is not None:
            ids = ids[: leading + limit]
        size = max(min(prompt.capacity, CHUNK_TOKENS) - leading, 1)
        step = size - size // 8
        starts = range(leading, max(len(ids) - size, leading) + step, step)
        return [
            Part(
                np.concatenate((ids[:leading], ids[start : start + size])),
                max(int(spans[start, 0]) - offset, 0) if start < len(ids) else 0,
                max(int(spans[min(start + size, len(ids)) - 1, 1]) - offset, 0) if len(ids) else 0,
            )
            for start in starts
        ]

    def _with_lead_in(
        self, text: str, prompt: Prompt, limit: int | None = None
    ) -> tuple[Tokens, int]:
        """Tokens of a document behind its lead-in, and how many are the lead-in's alone.

        Of the document at least `limit`, if it has so many.
        """
        most = None if limit is None else len(self.ids([prompt.lead_in])[0]) + limit
        tokens = self._text.read(prompt.lead_in + text, most)
        # A token of the lead-in and the document's beginning is the document's.
        offset = len(prompt.lead_in)
        return tokens, int((tokens.spans[:, 1] <= offset).sum()) if offset else 0

    def _shown(self, query: str) -> str:
        """A query, or of one far beyond the limit a beginning that is beyond it too."""
        if len(query) <= WINDOW:
            return query
        enough = 2 * self.limit + MARGIN
        spans = self._text.read(query, enough).spans
        return query[: spans[enough, 0]] if len(spans) > enough else query

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
        ends = self._text.read(query, kept).spans[:, 1]
        most = _length(self._fill("", instruction)) + kept
        # Text that is cut may come to more tokens than it was cut at.
        for count in range(min(kept, len(ends)), 0, -1):
            items = self._fill(query[: ends[count - 1]], instruction)
            if _length(items) <= most:
                return items
        return self._fill("", instruction)

    def _lead_in(self, instruction: str | None) -> str:
        """What stands before the document in its item; no query does."""
        template, text = self._family.asked(instruction)
        (item,) = (i for i in template if isinstance(i, str) and "{document}" in i)
        return fill(item, instruction=text, document="")

    def _template_length(self, instruction: str | None) -> int:
        """Tokens of the template without query and document."""
        (leading,) = self.ids([self._lead_in(instruction)])
        return _length(self._fill("", instruction)) + len(leading)


def _length(items: Sequence[Ids | None]) -> int:
    return sum(len(item) for item in items if item is not None)


def _joined(items: Sequence[Ids | None]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *(item for item in items if item is not None)])
