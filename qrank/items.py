"""Pairs and model inputs: which document each belongs to, and how they go to a backend together."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from qrank.errors import InputError
from qrank.work import Ids, Logits, Segments, Work

LongDocuments = Literal["truncate", "tail", "chunk"]


class Item(NamedTuple):
    """One model input: (a part of) a document beside its query; `ids` follow the prefix."""

    owner: int
    prefix: Ids
    ids: Ids
    segments: Segments | None
    truncated: bool
    part: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        """Tokens the model reads for it, those of the prefix included."""
        return len(self.prefix) + len(self.ids)


def works(items: list[Item]) -> list[tuple[list[int], Work]]:
    """Items as work, with their places: those of a prefix together, if there are several.

    A prefix of one item's own is no gain, and works run one after the other.
    """
    groups: dict[bytes, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.prefix.tobytes(), []).append(place)
    shared = [places for prefix, places in groups.items() if prefix and len(places) > 1]
    taken = {place for places in shared for place in places}
    single = [place for place in range(len(items)) if place not in taken]
    works = []
    if single:
        chosen = [items[place] for place in single]
        segments = [item.segments for item in chosen if item.segments is not None]
        sequences = [np.concatenate((item.prefix, item.ids)) for item in chosen]
        works.append((single, Work(sequences, segments or None)))
    for places in shared:
        chosen = [items[place] for place in places]
        works.append((places, Work([item.ids for item in chosen], prefix=chosen[0].prefix)))
    return works


def best_items(owners: list[int], logits: Logits) -> list[int]:
    """For each owner, in order, which of its items has the highest logit (the first of equals)."""
    best: dict[int, int] = {}
    for i, owner in enumerate(owners):
        if owner not in best or logits[i] > logits[best[owner]]:
            best[owner] = i
    return list(best.values())


def check(pairs: list[tuple[str, str]], long_documents: str) -> None:
    """Refuse what is no pair of strings, and no way to treat long ones."""
    if long_documents not in get_args(LongDocuments):
        raise InputError(
            f"long_documents is {long_documents!r}; give 'truncate', 'tail' or 'chunk'"
        )
    for i, item in enumerate(pairs):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"pair {i} is no (query, document) pair")
        for kind, text in zip(("query", "document"), item, strict=True):
            if not isinstance(text, str):
                raise InputError(f"{kind} {i} is {type(text).__name__}, not a string")
