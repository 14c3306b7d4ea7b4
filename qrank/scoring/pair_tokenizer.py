"""A query and a document -> token ids in the template, cut if they are too long."""

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
"""Maximum tokens in a chunk of a long document; less if the model's limit is lower."""


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
        prefix: token ids that every document's sequence starts with. Empty for encoder families,
            which read everything at once.
        items: token ids that follow; None marks the document's position.
        lead_in: text before the document that is tokenized together with it.
        capacity: maximum tokens of a document including its lead-in.
    """

    prefix: Ids
    items: tuple[Ids | None, ...]
    lead_in: str
    capacity: int


class PairTokenizer:
    """Builds a model's input from a query and a document. Safe to use from several threads.

    Special tokens come only from the family's template, never from text (`TextTokenizer`).
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
            max_length: maximum tokens of a pair, including the template's; None: the model's limit.
            threads: number of threads to tokenize many texts on; 1: the calling thread only.

        Raises:
            InputError: `max_length` exceeds the model's limit, or leaves no room for text.
            BundleError: the tokenizer cannot be read.
        """
        self._text = TextTokenizer(tokenizer, threads=threads)
        self._family = family
        self.limit = family.max_length if max_length is None else max_length
        least = sum(self._template_lengths(None)) + 2
        if not least <= self.limit <= family.max_length:
            raise InputError(
                f"max_length is {self.limit}; this model reads {least} to "
                f"{family.max_length} tokens"
            )

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without template or special tokens; see `TextTokenizer.ids`."""
        return self._text.ids(texts)

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """Put a query, and an instruction if the family takes one, into the template.

        A query that fills the limit by itself is cut, with a warning, to three quarters of the room
        that the template leaves; without a quarter for the document, all documents would score the
        same.

        Raises:
            InputError: the family takes no instruction, or the instruction leaves no room for text.
        """
        around, leading = self._template_lengths(instruction)
        room = self.limit - around - leading
        if room < 2:
            raise InputError(
                f"the instruction leaves {max(room, 0)} of {self.limit} tokens for query and "
                "document"
            )
        shown = self._shown(query)
        items = self._fill(shown, instruction)
        found = _length(items) - around
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
        """Token ids of lead-in and document, as from `ids`; the first `Prompt.capacity` fit."""
        lead_in = self._lead_in(instruction)
        return self._text.ids([lead_in + text for text in texts], most)

    def pair(self, prompt: Prompt, document: Ids) -> tuple[Ids, Segments | None]:
        """The token ids after the prompt's prefix, and their types, for a document that fits."""
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
        """One pair's complete input, prefix included and cut to fit, and its token types."""
        prompt = self.prompt(query, instruction)
        (ids,) = self.documents([document], instruction, prompt.capacity)
        sequence, types = self.pair(prompt, ids[: prompt.capacity])
        return np.concatenate((prompt.prefix, sequence)), types

    def capacity(self, prompt: Prompt, tokens: int | None) -> int:
        """`Prompt.capacity`, limited to `tokens` of the document itself."""
        if tokens is None:
            return prompt.capacity
        leading = len(self.ids([prompt.lead_in])[0]) if prompt.lead_in else 0
        return min(prompt.capacity, leading + tokens)

    def tail(self, text: str, prompt: Prompt, capacity: int) -> Ids:
        """Token ids of a document's lead-in and of its end, `capacity` tokens in total.

        The whole document is tokenized: where the last tokens start depends on those before.
        """
        (ids, _), leading = self._with_lead_in(text, prompt)
        return np.concatenate((ids[:leading], ids[leading:][max(len(ids) - capacity, 0) :]))

    def chunks(self, text: str, prompt: Prompt, limit: int | None = None) -> list[Part]:
        """Cut a document into overlapping parts.

        Each has at most `prompt.capacity` and at most CHUNK_TOKENS tokens, and starts with the
        document's lead-in. Neighbours overlap by an eighth, so that a sentence cut in one part is
        whole in another. At most `limit` tokens of the document are read.
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
        """Tokens of a lead-in and its document, and how many belong only to the lead-in.

        At least `limit` tokens of the document are read, if it has that many.
        """
        most = None if limit is None else len(self.ids([prompt.lead_in])[0]) + limit
        tokens = self._text.read(prompt.lead_in + text, most)
        # A token that spans the end of the lead-in counts as the document's.
        offset = len(prompt.lead_in)
        return tokens, int((tokens.spans[:, 1] <= offset).sum()) if offset else 0

    def _shown(self, query: str) -> str:
        """A query; if it is far beyond the limit, a beginning that still exceeds the limit."""
        if len(query) <= WINDOW:
            return query
        enough = 2 * self.limit + MARGIN
        spans = self._text.read(query, enough).spans
        return query[: spans[enough, 0]] if len(spans) > enough else query

    def _fill(self, query: str, instruction: str | None) -> list[Ids | None]:
        """The template's items as token ids; None for the document's item."""
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
        """`_fill` with at most `kept` tokens of the query."""
        ends = self._text.read(query, kept).spans[:, 1]
        most = _length(self._fill("", instruction)) + kept
        # Text cut after some of its tokens may have more tokens than these.
        for count in range(min(kept, len(ends)), 0, -1):
            items = self._fill(query[: ends[count - 1]], instruction)
            if _length(items) <= most:
                return items
        return self._fill("", instruction)

    def _lead_in(self, instruction: str | None) -> str:
        """The text before the document in its template item; it never includes the query."""
        template, text = self._family.asked(instruction)
        (item,) = (i for i in template if isinstance(i, str) and "{document}" in i)
        return fill(item, instruction=text, document="")

    def _template_lengths(self, instruction: str | None) -> tuple[int, int]:
        """Numbers of the template's tokens without query and document: all others, the lead-in."""
        (leading,) = self.ids([self._lead_in(instruction)])
        return _length(self._fill("", instruction)), len(leading)


def _length(items: Sequence[Ids | None]) -> int:
    return sum(len(item) for item in items if item is not None)


def _joined(items: Sequence[Ids | None]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *(item for item in items if item is not None)])
