"""Score a collection's candidates and cache logits query by query, so a run can be interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.quality.bm25 import Run
from qrank.quality.collection import Collection
from qrank.reranker import Reranker
from qrank.scoring.inputs import LongDocuments
from qrank.select.targets import Target
from qrank.system import cache
from qrank.system.disk import cannot_write
from qrank.system.safejson import parse_json
from qrank.system.steps import Progress, no_progress

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Setting:
    """How targets are opened and called: see `Reranker` and `Reranker.rank`."""

    device: str | None = None
    threads: int | None = None
    compute_dtype: str | None = None
    max_length: int | None = None
    instruction: str | None = None
    long_documents: LongDocuments = "truncate"

    def open(
        self, model: str | Path | Bundle, backend: str | None, family: str | None = None
    ) -> Reranker:
        """Open a target."""
        return Reranker(
            model,
            backend=backend,
            device=self.device,
            threads=self.threads,
            compute_dtype=self.compute_dtype,
            max_length=self.max_length,
            family=family,
        )


@dataclass(frozen=True)
class Scored:
    """A target's logits for candidates.

    Attributes:
        target: the target.
        logits: query id -> logits in the order of its candidates.
        before: number of queries whose logits came from the cache.
    """

    target: Target
    logits: dict[str, Logits]
    before: int


def score(
    reranker: Reranker,
    setting: Setting,
    collection: Collection,
    candidates: Run,
    *,
    custom: bool = False,
    progress: Progress = no_progress,
) -> Scored:
    """Score every query's candidates; logits from earlier runs are read from the cache folder.

    The cache key is everything that determines a logit: the variant's files and family, device,
    compute dtype, runtime, how documents are read, and the texts. So judgements may change, and
    queries may be added.

    Args:
        reranker: runs the target.
        setting: the setting it was opened with.
        collection: texts.
        candidates: what to score.
        custom: whether the backend is the user's own. Changes to its code cannot be detected, so
            nothing is cached.
        progress: called with the target's name before the first query and after each query.
    """
    file = None if custom else _file(reranker, setting)
    known = {} if file is None else _read(file)
    kept = frozenset(known)
    logits: dict[str, Logits] = {}
    before = 0
    progress(reranker.target.name, 0, len(candidates))
    for query, found in candidates.items():
        pairs = [(collection.queries[query], collection.documents[name]) for name in found]
        key = _key(pairs)
        if key in known and known[key].shape != (len(pairs),):
            del known[key]
        before += key in kept & known.keys()
        if key not in known:
            known[key] = reranker.score(
                pairs,
                raw=True,
                instruction=setting.instruction,
                long_documents=setting.long_documents,
            )
            if file is not None and (error := _append(file, key, known[key])):
                log.warning("what is scored is not kept, and a stopped run begins anew: %s", error)
                file = None
        logits[query] = known[key]
        progress(reranker.target.name, len(logits), len(candidates))
    return Scored(reranker.target, logits, before)


def _file(reranker: Reranker, setting: Setting) -> Path | None:
    """Path of a target's cached logits; None if there is no cache."""
    target = reranker.target
    # Threads change no logit; the cache key has the device; the dtype is the one in use.
    asked = {k: v for k, v in asdict(setting).items() if k not in ("threads", "device")}
    asked["compute_dtype"] = reranker.engine.compute_dtype
    return cache.place("logits", target.cache_key(reranker.engine.manifest, **asked), ".jsonl")


def _key(pairs: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _read(file: Path) -> dict[str, Logits]:
    known: dict[str, Logits] = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return known
    except (OSError, ValueError) as error:
        cache.ignore(file, str(error))
        return known
    for line in filter(None, lines):
        try:
            key, values = parse_json(line)
            logits = np.array(values, np.float32)
            if not np.isfinite(logits).all():
                raise ValueError("a logit is no finite number")
            known[key] = logits
        except (ValueError, TypeError):
            log.info("ignoring a line of %s that was not written to its end", file)
    return known


def _append(file: Path, key: str, logits: Logits) -> OSError | None:
    """Store logits; return the error if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Begin with a line end, since the last line may have been cut off. Use one write, so that
        # writes of other processes do not interleave with it.
        with file.open("ab", buffering=0) as out:
            out.write(("\n" + json.dumps([key, logits.tolist()])).encode())
    except OSError as error:
        return cannot_write(error, file, "QRANK_CACHE names another folder")
    return None
