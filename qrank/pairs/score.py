"""Score files of pairs: in chunks, so that memory is bounded and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np

from qrank.errors import InputError, QrankError
from qrank.pairs.folder import ELSEWHERE, claimed, forget, hidden, settle, whole
from qrank.pairs.kept import KeptScores
from qrank.pairs.plan import Piece, Shard, Source, fingerprint, pieces, sources
from qrank.pairs.table import Chunk, Columns, Reject, Table
from qrank.reranker import Reranker
from qrank.scoring import arguments
from qrank.scoring.activation import Scores
from qrank.scoring.inputs import LongDocuments
from qrank.system.steps import Progress, no_progress

OnError = Literal["stop", "reject"]

ROWS = 1024
"""Rows of a chunk, unless asked: about ten seconds of a small model on two cores."""

_POLL = 0.5
"""Seconds between two looks at files that other processes work on."""

log = logging.getLogger("qrank")


@dataclass
class ScoredFiles:
    """What `score_files` did.

    Attributes:
        written: outputs of this call.
        there: outputs that were there already.
        rows: rows of the written ones, rejected ones included.
        kept: how many of these an earlier call had scored.
        rejected: how many of these could not be scored.
        rejects: the files that name them, with the reasons.
    """

    written: list[Path] = field(default_factory=list)
    there: list[Path] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    rejected: int = 0
    rejects: list[Path] = field(default_factory=list)


def score_files(
    reranker: Reranker,
    files: str | Path | Iterable[str | Path],
    folder: str | Path,
    *,
    query_column: str = "query",
    document_column: str = "document",
    score_column: str = "score",
    raw: bool = False,
    instruction: str | None = None,
    long_documents: LongDocuments = "truncate",
    rows: int = ROWS,
    shard: Shard | str | None = None,
    on_error: OnError = "stop",
    progress: Progress = no_progress,
) -> ScoredFiles:
    """Score the pairs in files: the same rows with a column of scores, one output file per input.

    Rows keep their order and their other columns. A call that was interrupted, even by SIGKILL, is
    continued by the same call: outputs that are there are left alone, and scores of an unfinished
    one are kept chunk by chunk. The result is the same to the last byte. Processes with the same
    folder share the work, file by file.

    Args:
        reranker: scores the pairs.
        files: files, patterns such as `in/*.parquet`, or folders. Parquet (takes the extra
            `parquet`), JSONL, CSV (both with a header) or TSV (without quotation marks), by suffix:
            .parquet, .jsonl, .ndjson, .csv, .tsv; text may be compressed (.gz, .zst, .bz2, .xz).
        folder: of the outputs, created if missing. Its `_qrank.json` names the model, the target
            and the settings; later calls must have the same.
        query_column: column or field of the queries.
        document_column: column or field of the documents.
        score_column: column or field of the scores: float64.
        raw: logits instead of scores.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        rows: rows of a chunk: memory, and what is lost if the process is killed. Within a chunk
            pairs are sorted by length, and equal pairs are scored once.
        shard: the share of this process, such as "3/16"; see `Shard.parse`. Whole files in turn, if
            there are as many as shards. Otherwise rows, file after file; the output is then named
            `a.03-of-16.parquet`.
        on_error: about a row without usable texts, `stop`, or leave it out of the output, and
            write its number and the reason to a file.
        progress: called with what is done, the rows so far, and of all files of this process, by an
            estimate for text files.

    Raises:
        InputError: files or rows cannot be used, or the folder's outputs were scored otherwise.
        OSError: an output cannot be written.
        TargetError: as for `Reranker.rank`.
    """
    rows = arguments.whole("rows", rows, 1) or ROWS
    raw = arguments.flag("raw", raw)
    arguments.one_of("on_error", on_error, get_args(OnError))
    columns = Columns(query_column, document_column, score_column)
    shard = Shard.parse(shard) if isinstance(shard, str) else shard
    found = sources(files)
    target = Path(folder)
    _see_that_inputs_stay(found, target)

    def count(source: Source) -> int:
        with closing(source.open(columns)) as table:
            return table.count()

    settings = {
        **settings_of(reranker, raw, instruction, long_documents),
        **{f"{name}_column": value for name, value in columns._asdict().items()},
        "rows": rows,
        "shards": None if shard is None else shard.count,
        "inputs": None if shard is None else fingerprint({x.name: x.path for x in found}),
    }
    todo = pieces(found, shard, rows, count)
    settle(target, settings, (target / piece.name for piece in todo))
    if not todo:
        log.warning(
            "nothing is left for shard %s: there are fewer chunks of %d rows than shards; --rows "
            "makes smaller ones",
            shard,
            rows,
        )

    def score(pairs: list[tuple[str, str]]) -> Scores:
        if raw:
            logits = reranker.score(
                pairs, raw=True, instruction=instruction, long_documents=long_documents
            )
            return logits.astype(np.float64)
        return reranker.score(pairs, instruction=instruction, long_documents=long_documents)

    job = _Job(score, target, columns, rows, on_error, _Expected(todo, progress))
    job.run(todo)
    return job.done


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


class _Expected:
    """Tells how many rows are done, and how many there will be: by bytes, in unopened files."""

    def __init__(self, todo: list[Piece], progress: Progress) -> None:
        self._bytes = {piece: piece.source.path.stat().st_size for piece in todo}
        self._rows: dict[Piece, int] = {}
        self._progress = progress
        # Sums, because there may be many files: of the rows that are known, of the bytes of these
        # pieces, and of all bytes.
        self._known = self._opened = 0
        self._all = sum(self._bytes.values())

    def opened(self, piece: Piece, rows: int) -> None:
        """A piece has so many rows."""
        if piece not in self._rows:
            self._opened += self._bytes[piece]
        self._known += rows - self._rows.get(piece, 0)
        self._rows[piece] = rows

    def leave_out(self, piece: Piece) -> None:
        """A piece is there already."""
        size = self._bytes.pop(piece)
        self._all -= size
        if piece in self._rows:
            self._opened -= size
            self._known -= self._rows.pop(piece)

    def tell(self, done: int) -> None:
        """So many rows are done."""
        rest = self._all - self._opened
        more = round(rest * self._known / self._opened) if self._opened else 0
        self._progress("scoring", done, self._known + more)


class _Job:
    """Scores pieces, one after the other."""

    def __init__(
        self,
        score: Callable[[list[tuple[str, str]]], Scores],
        folder: Path,
        columns: Columns,
        rows: int,
        on_error: OnError,
        expected: _Expected,
    ) -> None:
        self._score = score
        self._folder = folder
        self._columns = columns
        self._rows = rows
        self._on_error = on_error
        self._expected = expected
        self._outdated: list[Path] = []
        self.done = ScoredFiles()

    def run(self, todo: list[Piece]) -> None:
        """Score the pieces whose output is not there; wait for those that others work on."""
        left = []
        for piece in todo:
            if self._there(piece):
                continue
            left.append(piece)
            if piece.stop is not None:
                self._expected.opened(piece, piece.stop - piece.first)
            elif piece.quick:  # shows the columns too: an error comes before hours of work
                with closing(piece.source.open(self._columns)) as table:
                    self._expected.opened(piece, piece.size(table))
        waits = False
        while left:
            left = [piece for piece in left if not (self._there(piece) or self._claim(piece))]
            if left:
                if not waits:
                    log.warning("waiting for %s, which another process scores", left[0].name)
                waits = True
                time.sleep(_POLL)
        if self._outdated:
            log.warning(
                "%d outputs are older than their inputs, the first %s; they are left as they are: "
                "remove them to score the inputs again",
                *(len(self._outdated), self._outdated[0]),
            )

    def _there(self, piece: Piece) -> bool:
        output = self._folder / piece.name
        if not output.exists():
            return False
        self.done.there.append(output)
        self._expected.leave_out(piece)
        forget(output)
        if output.stat().st_mtime < piece.source.path.stat().st_mtime:
            self._outdated.append(output)
        return True

    def _claim(self, piece: Piece) -> bool:
        """Score a piece; False if another process does."""
        output = self._folder / piece.name
        output.parent.mkdir(parents=True, exist_ok=True)
        with claimed(output) as file:
            if file is None:
                return False
            if not self._there(piece):  # until now it may have been finished
                kept = KeptScores(file, hidden(output, ".kept"))
                with closing(piece.source.open(self._columns)) as table:
                    self._write(piece, output, table, kept)
                self.done.written.append(output)
        return True

    def _write(self, piece: Piece, output: Path, table: Table, kept: KeptScores) -> None:
        done = self.done
        self._expected.opened(piece, piece.size(table))
        self._expected.tell(done.rows)
        rejected = good = 0
        first = ""
        rejects: IO[bytes] | None = None
        with (
            whole(output) as file,
            ExitStack() as opened,
            closing(table.writer(file)) as writer,
        ):
            for chunk in table.chunks(self._rows, piece.first, piece.stop):
                if chunk.rejects and self._on_error == "stop":
                    raise _stopped(piece, table.unit, chunk.rejects[0])
                if chunk.rejects and rejects is None:
                    first = chunk.rejects[0].reason
                    rejects = opened.enter_context(whole(rejects_of(output)))
                if rejects is not None:
                    rejects.writelines(_listed(table.unit, each) for each in chunk.rejects)
                writer.write(chunk, self._scores(piece, chunk, kept))
                rejected += len(chunk.rejects)
                good += len(chunk.pairs)
                done.rows += chunk.rows
                self._expected.tell(done.rows)
            if rejected and not good:
                raise InputError(
                    f"none of the {rejected} rows of {piece.source.path} can be scored: "
                    f"{first}, and so on"
                )
            if rejects is None:  # of an earlier state of the input
                rejects_of(output).unlink(missing_ok=True)
        if rejects is not None:
            done.rejects.append(rejects_of(output))
        done.rejected += rejected

    def _scores(self, piece: Piece, chunk: Chunk, kept: KeptScores) -> Scores:
        """The scores of a chunk's good rows."""
        pairs = list(dict.fromkeys(chunk.pairs))
        if not pairs:
            return np.empty(0)
        scores = kept.take(pairs)
        if scores is not None:
            self.done.kept += chunk.rows
        else:
            try:
                scores = self._score(pairs)
            except QrankError as error:
                raise type(error)(f"{piece.source.path}: {error}") from error
            kept.add(pairs, scores)
        places = {pair: place for place, pair in enumerate(pairs)}
        return scores[[places[pair] for pair in chunk.pairs]]


def rejects_of(output: Path) -> Path:
    """The file that lists the rows of an output's input that could not be scored."""
    return hidden(output, ".rejects")


def _stopped(piece: Piece, unit: str, reject: Reject) -> InputError:
    return InputError(
        f"{piece.source.path}, {unit} {reject.number}: {reject.reason}; --on-error reject leaves "
        "such rows out, and lists them"
    )


def _listed(unit: str, reject: Reject) -> bytes:
    """A reject as a line of JSON."""
    record = {unit: reject.number, "reason": reject.reason}
    if reject.text is not None:
        record["text"] = reject.text
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


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
