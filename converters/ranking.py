"""Rank queries with the original, as many as time allows, for every variant to reproduce."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.bundle.agreement import TOP, RankingData, Reference
from qrank.bundle.sequences import Logits, Sequences
from qrank.converters.checkpoint.ids import encode_pairs
from qrank.converters.checkpoint.ranking import ranking_data
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.checkpoint.reference import Original
from qrank.errors import InputError

SECONDS = 20.0
"""Time that the original may take for rankings, or that of its probes if they take longer."""

AT_LEAST = 2
"""Number of queries that are ranked however slow the model is: fewer pairs than the probes."""

_UNKNOWN = 0.2
"""A query of qrank's is left out if the tokenizer does not know this share of its tokens, because
its script is not the model's: the original's own order of such passages means nothing."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Ranking:
    """Queries with their passages as token ids, and the original's logits for them."""

    works: list[Sequences]
    reference: Reference


def make_ranking(
    original: Original, tokenizer: Path, data: RankingData | None, old: Reference | None
) -> Ranking | None:
    """Score queries and passages with the original.

    The number of queries follows from its speed: see `SECONDS`. If the bundle was proven on the
    same data before, its logits are used again.

    Args:
        original: the model.
        tokenizer: the bundle's tokenizer.
        data: the user's own; None: qrank's.
        old: the bundle's; None if it has none.

    Returns:
        None if the model's tokenizer reads none of qrank's queries; a warning then says so.

    Raises:
        InputError: none of the user's queries has passages that the original tells apart.
    """
    chosen = data or ranking_data()
    works = _encoded(chosen, original.checkpoint, tokenizer, every=data is not None)
    if old is not None and old.data == chosen.name:
        again = works[: len(old.logits)]
        if len(again) == len(old.logits) and _digest(again) == old.digest:
            return Ranking(again, old)
    logits = _ranked(original, works)
    # A query whose passages all have one score has no order to keep.
    kept = [place for place, found in enumerate(logits) if np.ptp(found)]
    if not kept:
        if data is not None:
            raise InputError(f"{data.name}: {original.checkpoint.name} tells no passages apart")
        log.warning(
            "%s: no proof of ranking, because its tokenizer reads none of qrank's queries; prove "
            "it on your own: --ranking-data QUERIES DOCUMENTS",
            original.checkpoint.name,
        )
        return None
    works = [works[place] for place in kept]
    found = tuple(tuple(logits[place].tolist()) for place in kept)
    return Ranking(works, Reference(chosen.name, _digest(works), found))


def _encoded(
    data: RankingData, checkpoint: Checkpoint, tokenizer: Path, *, every: bool
) -> list[Sequences]:
    unknown = checkpoint.tokenizer.unk_token_id
    works = []
    for query, passages in data.queries:
        pairs = [(query, passage) for passage in passages]
        work = encode_pairs(pairs, tokenizer, checkpoint.family)
        share = np.mean(np.concatenate(work.ids) == unknown) if unknown is not None else 0.0
        if len(work) > TOP and (every or share < _UNKNOWN):
            works.append(work)
    return works


def _ranked(original: Original, works: Sequence[Sequences]) -> list[Logits]:
    """Logits of the first works: as many as fit the time, judging by those before."""
    limit = max(SECONDS, original.seconds)
    logits: list[Logits] = []
    begun, tokens = time.perf_counter(), 0
    for work in works:
        more = int(work.lengths.sum())
        spent = time.perf_counter() - begun
        if len(logits) >= AT_LEAST and spent * (tokens + more) / tokens > limit:
            break
        logits.append(original.logits(work))
        tokens += more
    return logits


def _digest(works: Sequence[Sequences]) -> str:
    total = hashlib.sha256()
    for work in works:
        for ids in work.ids:
            total.update(len(ids).to_bytes(4, "big") + ids.astype("<i4").tobytes())
    return total.hexdigest()
