"""Score files of pairs: in chunks, so that memory is bounded and a killed run goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qrank.errors import InputError, QrankError
from qrank.pairs.folder import claimed, forget, hidden, whole
from qrank.pairs.job import ROWS, Job, OnError, once
from qrank.pairs.kept import KeptScores
from qrank.pairs.plan import Piece, Shard
from qrank.pairs.table import Chunk, Reject, Table
from qrank.reranker import Reranker
from qrank.scoring.activation import Scores
from qrank.scoring.inputs import LongDocuments
from qrank.system.steps import Progress, no_progress

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
    shard = Shard.parse(shard) if isinstance(shard, str) else shard
    job = Job.of(
        files,
        folder,
        None if shard is None else [shard],
        query_column=query_column,
        document_column=document_column,
        score_column=score_column,
        raw=raw,
        instruction=instruction,
        long_documents=long_documents,
        rows=rows,
        on_error=on_error,
    )
    if not job.pieces:
        log.warning(
            "nothing is left for shard %s: there are fewer chunks of %d rows than shards; --rows "
            "makes smaller ones",
            shard,
            job.rows,
        )
    return Scoring(job, progress).run(reranker)


class Expected:
    """Tells how many rows are done, and how many there will be: by bytes, in unopened files."""

    def __init__(self, todo: Sequence[Piece], progress: Progress) -> None:
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


class Scoring:
    """The scoring of a job's pieces.

    Attributes:
        done: what was done so far.
        expected: how many rows there will be.

    Args:
        job: what is scored, and how.
        progress: as for `score_files`.
        pieces: those of the job that are scored here. None: all.
    """

    def __init__(
        self, job: Job, progress: Progress = no_progress, pieces: Sequence[Piece] | None = None
    ) -> None:
        self._job = job
        self._pieces = job.pieces if pieces is None else pieces
        self._outdated: list[Path] = []
        self.done = ScoredFiles()
        self.expected = Expected(self._pieces, progress)

    def run(self, reranker: Reranker) -> ScoredFiles:
        """Score the pieces one after the other; wait for those that other processes work on.

        Raises as `score_files`.
        """
        self._job.settle(reranker)
        left = self.left()
        waits = False
        while left:
            left = [each for each in left if not (self._there(each) or self._claim(reranker, each))]
            if left:
                if not waits:
                    log.warning("waiting for %s, which another process scores", left[0].name)
                waits = True
                time.sleep(_POLL)
        self.tell_of_outdated()
        return self.done

    def left(self) -> list[Piece]:
        """The pieces whose output is not there.

        Raises:
            InputError: one lacks a column. Not all are read for that.
        """
        left = []
        for piece in self._pieces:
            if self._there(piece):
                continue
            left.append(piece)
            if piece.stop is not None:
                self.expected.opened(piece, piece.stop - piece.first)
            elif piece.quick:  # shows the columns too: an error comes before hours of work
                with closing(piece.source.open(self._job.columns)) as table:
                    self.expected.opened(piece, piece.size(table))
        return left

    def add(self, piece: Piece | None, other: ScoredFiles) -> None:
        """Add what another process did of a piece."""
        done = self.done
        if piece is not None:
            self.expected.opened(piece, other.rows)
        done.written += other.written
        done.there += other.there
        done.rows += other.rows
        done.kept += other.kept
        done.rejected += other.rejected
        done.rejects += other.rejects

    def tell_of_outdated(self) -> None:
        """Warn of outputs that were there, and are older than their inputs."""
        if self._outdated:
            log.warning(
                "%d outputs are older than their inputs, the first %s; they are left as they are: "
                "remove them to score the inputs again",
                *(len(self._outdated), self._outdated[0]),
            )

    def _there(self, piece: Piece) -> bool:
        output = self._job.folder / piece.name
        if not output.exists():
            return False
        self.done.there.append(output)
        self.expected.leave_out(piece)
        forget(output)
        if output.stat().st_mtime < piece.source.path.stat().st_mtime:
            self._outdated.append(output)
        return True

    def _claim(self, reranker: Reranker, piece: Piece) -> bool:
        """Score a piece; False if another process does."""
        output = self._job.folder / piece.name
        output.parent.mkdir(parents=True, exist_ok=True)
        with claimed(output) as file:
            if file is None:
                return False
            if not self._there(piece):  # until now it may have been finished
                kept = KeptScores(file, hidden(output, ".kept"))
                with closing(piece.source.open(self._job.columns)) as table:
                    self._write(reranker, piece, output, table, kept)
                self.done.written.append(output)
        return True

    def _write(
        self, reranker: Reranker, piece: Piece, output: Path, table: Table, kept: KeptScores
    ) -> None:
        done = self.done
        self.expected.opened(piece, piece.size(table))
        self.expected.tell(done.rows)
        rejected = good = 0
        first = ""
        rejects: IO[bytes] | None = None
        with (
            whole(output) as file,
            ExitStack() as opened,
            closing(table.writer(file)) as writer,
        ):
            for chunk in table.chunks(self._job.rows, piece.first, piece.stop):
                if chunk.rejects and self._job.on_error == "stop":
                    raise _stopped(piece, table.unit, chunk.rejects[0])
                if chunk.rejects and rejects is None:
                    first = chunk.rejects[0].reason
                    rejects = opened.enter_context(whole(rejects_of(output)))
                if rejects is not None:
                    rejects.writelines(_listed(table.unit, each) for each in chunk.rejects)
                writer.write(chunk, self._scores(reranker, piece, chunk, kept))
                rejected += len(chunk.rejects)
                good += len(chunk.pairs)
                done.rows += chunk.rows
                self.expected.tell(done.rows)
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

    def _scores(self, reranker: Reranker, piece: Piece, chunk: Chunk, kept: KeptScores) -> Scores:
        """The scores of a chunk's good rows."""

        def kept_or_scored(pairs: list[tuple[str, str]]) -> Scores:
            scores = kept.take(pairs)
            if scores is not None:
                self.done.kept += chunk.rows
                return scores
            try:
                scores = self._job.scores(reranker, pairs)
            except QrankError as error:
                raise type(error)(f"{piece.source.path}: {error}") from error
            kept.add(pairs, scores)
            return scores

        return once(chunk.pairs, kept_or_scored)


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
