"""Which files are to be scored, and which rows of them by this process."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from qrank.errors import InputError
from qrank.pairs.lines import Csv, Jsonl, Tsv
from qrank.pairs.parquet import ParquetTable
from qrank.pairs.table import Columns, Table
from qrank.system.textfiles import SUFFIXES

FORMS: Mapping[str, Callable[[Path, Columns], Table]] = {
    ".parquet": ParquetTable,
    ".jsonl": Jsonl,
    ".ndjson": Jsonl,
    ".csv": Csv,
    ".tsv": Tsv,
}
"""Suffix -> how such a file is opened. All but Parquet may have one of `SUFFIXES` after it."""


@dataclass(frozen=True)
class Source:
    """A file to be scored.

    Attributes:
        path: where it is.
        name: of its output, relative to the output folder: the path below the part of a pattern
            that has no wildcards.
    """

    path: Path
    name: str

    def open(self, columns: Columns) -> Table:
        """Open it by its suffix."""
        return FORMS[_suffixes(self.name)[1]](self.path, columns)


@dataclass(frozen=True)
class Piece:
    """What one process scores at a time: a file, or a part of it.

    Attributes:
        source: the file.
        name: of the output.
        first: its first row, a multiple of the rows of a chunk.
        stop: the row after its last one; None: the end of the file.
    """

    source: Source
    name: str
    first: int = 0
    stop: int | None = None

    @property
    def quick(self) -> bool:
        """Whether its columns and its size are known without reading all of it."""
        return self.name.endswith(".parquet")

    def size(self, table: Table) -> int:
        """How many rows it has of its opened file."""
        count = table.count()
        return (count if self.stop is None else min(self.stop, count)) - self.first


@dataclass(frozen=True)
class Shard:
    """One of the equal shares of a job, from 0."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Read "3/16"; or "auto" for a task of a Slurm array, by its variables.

        "auto/16" is the task that SLURM_ARRAY_TASK_ID or Kubernetes' JOB_COMPLETION_INDEX names, of
        16: a task that is repeated alone keeps its number.

        Raises:
            InputError: it is none of these, or the variables are missing or have gaps.
        """
        if found := re.fullmatch(r"(\d+|auto)/(\d+)", text):
            count = int(found[2])
            number = _task(environment) if found[1] == "auto" else int(found[1])
        elif text == "auto":
            number, count = _slurm(environment)
        else:
            raise InputError(f"expected a shard such as 3/16, auto/16 or auto, found {text!r}")
        if number >= count:
            raise InputError(
                f"there is no shard {number}/{count}: shards are numbered from 0, so that the last "
                f"of {count} is {count - 1}/{count}"
            )
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def named(self, name: str) -> str:
        """The name of this shard's part of a file: "a.03-of-16.jsonl"; parts are sorted by it."""
        stem, form, packed = _suffixes(name)
        return f"{stem}.{self.number:0{len(str(self.count - 1))}}-of-{self.count}{form}{packed}"

    def share(self, total: int) -> tuple[int, int]:
        """Its range of `total` things: shares are disjoint, complete, and differ by 1 at most."""
        return total * self.number // self.count, total * (self.number + 1) // self.count


def sources(files: str | Path | Iterable[str | Path]) -> list[Source]:
    """The files that paths, folders and patterns name, in the order of their outputs' names.

    Raises:
        InputError: one names no file, or a file of another kind; or two files have the same output.
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    if not given:
        raise InputError("there is no file to score")
    found: dict[str, Source] = {}
    for each in given:
        for source in _named(str(each)):
            known = found.setdefault(source.name, source)
            if known.path.resolve() != source.path.resolve():
                raise InputError(
                    f"{known.path} and {source.path} would both be written to {source.name}; score "
                    "them into different folders"
                )
    return [found[name] for name in sorted(found)]


def pieces(
    found: list[Source], shard: Shard | None, rows: int, count: Callable[[Source], int]
) -> list[Piece]:
    """What a shard scores.

    Whole files in turn, if there are as many as shards. Otherwise all rows, file after file, are
    cut into equal ranges of chunks, so that a chunk is the same whoever scores it.

    Args:
        found: all files.
        shard: None: everything.
        rows: of a chunk.
        count: gives a file's number of rows; only called if files are cut.
    """
    if shard is None or shard.count <= len(found):
        step, first = (1, 0) if shard is None else (shard.count, shard.number)
        return [Piece(source, source.name) for source in found[first::step]]
    chunks = [-(-count(source) // rows) for source in found]
    first, stop = shard.share(sum(chunks))
    cut = []
    passed = 0
    for source, own in zip(found, chunks, strict=True):
        start, end = max(first - passed, 0), min(stop - passed, own)
        if start < end:
            cut.append(Piece(source, shard.named(source.name), start * rows, end * rows))
        passed += own
    return cut


def fingerprint(files: Mapping[str, Path]) -> dict[str, int | str]:
    """Tells whether two processes see the same files: by names and sizes, not by where they lie."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()
    return {"files": len(sizes), "bytes": sum(sizes.values()), "digest": digest[:16]}


def _named(text: str) -> Iterator[Source]:
    path = Path(text)
    if path.is_file():
        yield _source(path, path.name)
        return
    if path.is_dir():
        base, found = path, sorted(path.rglob("*"))
        # As others do, pass by what begins with _ or a dot: markers, and our own unfinished files.
        found = [p for p in found if not any(x[0] in "_." for x in p.relative_to(base).parts)]
        found = [each for each in found if each.is_file() and _suffixes(each.name)[1] in FORMS]
    else:
        parts = takewhile(lambda part: not glob.has_magic(part), path.parts)
        base = Path(*parts)
        found = [Path(each) for each in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
        found = [each for each in found if each.is_file()]
    if not found:
        raise InputError(f"{text}: there is no such file, and no folder with {_KINDS}")
    for each in found:
        yield _source(each, each.relative_to(base).as_posix())


def _source(path: Path, name: str) -> Source:
    _, form, packed = _suffixes(name)
    if form not in FORMS or (packed and form == ".parquet"):
        raise InputError(f"{path}: expected {_KINDS}, by the name's end")
    return Source(path, name)


_KINDS = f"{', '.join(FORMS)} (all but the first also with {', '.join(SUFFIXES)})"


def _suffixes(name: str) -> tuple[str, str, str]:
    """A name as stem, form and compression: ("a", ".jsonl", ".gz"); the form may be unknown."""
    packed = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    path = PurePosixPath(name.removesuffix(packed))
    return str(path.with_suffix("")), path.suffix, packed


def _task(environment: Mapping[str, str]) -> int:
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        if name in environment:
            return _whole(environment, name)
    raise InputError(
        "auto takes the shard's number from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, and "
        "neither is set; write it out: 3/16"
    )


def _slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX")]
    if lacking := [name for name in names if name not in environment]:
        raise InputError(f"{lacking[0]} is not set: auto is for tasks of a Slurm array; write 3/16")
    task, count, least, most = (_whole(environment, name) for name in names)
    step = max((most - least) // max(count - 1, 1), 1)
    if least + step * (count - 1) != most or (task - least) % step:
        raise InputError(
            f"the Slurm array has {count} tasks from {least} to {most}, with gaps: write how many "
            'shards there are, --shard "$SLURM_ARRAY_TASK_ID/16"'
        )
    return (task - least) // step, count


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not re.fullmatch(r"[0-9]+", text):
        raise InputError(f"{name} is {text!r}, not a whole number")
    return int(text)
