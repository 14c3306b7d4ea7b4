"""A job: which files are scored, and how. It is the same for all processes that share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qrank.errors import InputError
from qrank.pairs.folder import ELSEWHERE, settle
from qrank.pairs.plan import Piece, Shard, Source, fingerprint, pieces, sources
from qrank.pairs.table import Columns
from qrank.reranker import Reranker
from qrank.scoring import arguments
from qrank.scoring.activation import Scores
from qrank.scoring.inputs import LongDocuments

OnError = Literal["stop", "reject"]

ROWS = 1024
"""Rows of a chunk, unless asked: about ten seconds of a small model on two cores."""


@dataclass(frozen=True)
class Job:
    """What is scored, and how. Can be pickled.

    Attributes:
        folder: of the outputs.
        pieces: what is scored.
        columns: names of the columns.
        raw: logits instead of scores.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        rows: of a chunk.
        on_error: about a row without usable texts.
        shares: settings of the folder that tell how the job is cut into shards.
    """

    folder: Path
    pieces: Sequence[Piece]
    columns: Columns
    raw: bool
    instruction: str | None
    long_documents: LongDocuments
    rows: int
    on_error: OnError
    shares: dict[str, Any]

    @classmethod
    def of(
        cls,
        files: str | Path | Iterable[str | Path],
        folder: str | Path,
        shards: Sequence[Shard] | None = None,
        *,
        query_column: str = "query",
        document_column: str = "document",
        score_column: str = "score",
        raw: bool = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        rows: int = ROWS,
        on_error: OnError = "stop",
    ) -> Job:
        """Find the files, and cut them if they are fewer than shards.

        Args:
            files: as for `score_files`, as are all others but `shards`.
            folder: see `files`.
            shards: the shares to do, of one count. None: everything, in whole files.
            query_column: see `files`.
            document_column: see `files`.
            score_column: see `files`.
            raw: see `files`.
            instruction: see `files`.
            long_documents: see `files`.
            rows: see `files`.
            on_error: see `files`.

        Raises:
            InputError: as for `score_files`.
        """
        rows = arguments.whole("rows", rows, 1) or ROWS
        raw = arguments.flag("raw", raw)
        arguments.one_of("on_error", on_error, get_args(OnError))
        columns = Columns(query_column, document_column, score_column)
        found = sources(files)
        target = Path(folder)
        _see_that_inputs_stay(found, target)

        @cache
        def count(source: Source) -> int:
            with closing(source.open(columns)) as table:
                return table.count()

        every: Sequence[Shard | None] = [None] if shards is None else shards
        shares: dict[str, Any] = {"shards": None, "inputs": None}
        if shards is not None:
            files_found = fingerprint({each.name: each.path for each in found})
            shares = {"shards": shards[0].count, "inputs": files_found}
        return cls(
            target,
            [piece for shard in every for piece in pieces(found, shard, rows, count)],
            columns,
            raw,
            instruction,
            long_documents,
            rows,
            on_error,
            shares,
        )

    def settle(self, reranker: Reranker) -> None:
        """Write down how the folder's files are scored, or compare; see `folder.settle`."""
        settings = {
            **settings_of(reranker, self.raw, self.instruction, self.long_documents),
            **{f"{name}_column": value for name, value in self.columns._asdict().items()},
            "rows": self.rows,
            **self.shares,
        }
        settle(self.folder, settings, (self.folder / piece.name for piece in self.pieces))

    def scores(self, reranker: Reranker, pairs: Sequence[tuple[str, str]]) -> Scores:
        """Scores as they are written; shape [n]."""
        return scores_of(reranker, pairs, self.raw, self.instruction, self.long_documents)


def scores_of(
    reranker: Reranker,
    pairs: Sequence[tuple[str, str]],
    raw: bool,
    instruction: str | None,
    long_documents: LongDocuments,
) -> Scores:
    """Scores, or with `raw` logits, of pairs, as float64; shape [n]. See `Reranker.score`."""
    if not raw:
        return reranker.score(pairs, instruction=instruction, long_documents=long_documents)
    logits = reranker.score(pairs, raw=True, instruction=instruction, long_documents=long_documents)
    return logits.astype(np.float64)


def once(
    pairs: Sequence[tuple[str, str]], score: Callable[[list[tuple[str, str]]], Scores]
) -> Scores:
    """The scores of pairs, shape [n]; equal ones are scored once, and none is not scored at all."""
    unlike = list(dict.fromkeys(pairs))
    if not unlike:
        return np.empty(0)
    scores = score(unlike)
    places = {pair: place for place, pair in enumerate(unlike)}
    return scores[[places[pair] for pair in pairs]]


def settings_of(
    reranker: Reranker, raw: bool, instruction: str | None, long_documents: LongDocuments
) -> dict[str, Any]:
    """Everything that a pair's score depends on, as JSON values; threads do not matter."""
    engine, target = reranker.engine, reranker.target
    kind = "logits" if raw else "model"
    if engine.calibration is not None and not raw:
        fitted = json.dumps(asdict(engine.calibration))
        kind = f"calibrated {hashlib.sha256(fitted.encode()).hexdigest()[:16]}"
    return {
        "model": engine.manifest.name,
        "digest": engine.manifest.identity(target.variant),
        "target": f"{target.key.selector}@{target.device}",
        "compute_dtype": engine.compute_dtype,
        "max_length": engine.max_length,
        "scores": kind,
        "instruction": instruction,
        "long_documents": long_documents,
    }


def _see_that_inputs_stay(found: list[Source], folder: Path) -> None:
    """Refuse outputs beside their inputs, and inputs that are outputs.

    Raises:
        InputError: an input lies in the output folder.
    """
    inside = folder.resolve()
    for source in found:
        if inside in source.path.resolve().parents:
            raise InputError(
                f"{source.path} lies in {folder}, where the outputs are to be written; {ELSEWHERE}"
            )
