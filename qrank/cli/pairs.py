"""The part of `qrank score` that reads files of pairs and writes files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qrank.cli.common import notice, resumable
from qrank.cli.progress import progress_bars
from qrank.errors import InputError
from qrank.pairs.plan import Shard
from qrank.pairs.score import ROWS, OnError, score_files
from qrank.reranker import Reranker

Command = TypeVar("Command", bound=Callable[..., Any])


def _shard(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Shard | None:
    """Parse 3/16, auto/16 or auto."""
    try:
        return None if value is None else Shard.parse(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from error


_OPTIONS = (
    click.option(
        "--pairs",
        multiple=True,
        type=click.Path(path_type=str),
        help="Score the pairs in these files: Parquet, JSONL, CSV or TSV. A file, a folder or a "
        "quoted pattern; can be repeated, and FILES are more of them.",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        help="With --pairs or --run: folder of the outputs. The same command continues what was "
        "interrupted.",
    ),
    click.option("--query-column", help="With --pairs.  [default: query]"),
    click.option("--document-column", help="With --pairs.  [default: document]"),
    click.option("--score-column", help="With --pairs: column to add.  [default: score]"),
    click.option(
        "--on-error",
        type=click.Choice(get_args(OnError)),
        help="With --pairs: stop at a row without texts, or leave it out and list it.  "
        "[default: stop]",
    ),
    click.option(
        "--rows",
        type=click.IntRange(min=1),
        help=f"With --pairs: rows that are scored, and kept, at a time.  [default: {ROWS}]",
    ),
    click.option(
        "--shard",
        metavar="I/N",
        callback=_shard,
        help="With -o: do share I of N, from 0. auto/N: I is the task of a Slurm array or of a "
        "Kubernetes job; auto: N too, from Slurm.",
    ),
)

_ONLY = ("query_column", "document_column", "score_column", "on_error", "rows")
"""Parameters that only go with --pairs, and whose default is that of `score_files`."""

PAIRS = ("pairs", "output", "shard", *_ONLY)
"""All parameters of `pairs_options`."""


def pairs_options(command: Command) -> Command:
    """Options for files of pairs, and of outputs."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check(options: dict[str, Any], others: dict[str, object], *, run: bool) -> None:
    """Refuse options that do not go together.

    Args:
        options: values of `pairs_options`.
        others: name -> value of options that do not go with --pairs.
        run: whether there is --run.

    Raises:
        UsageError: there are such.
    """
    pairs, output = options["pairs"], options["output"]
    if pairs and output is None:
        raise click.UsageError("--pairs goes with -o FOLDER")
    if pairs:
        for name, value in others.items():
            if value is not None and value is not False:
                raise click.UsageError(f"--pairs takes no {name}")
        return
    for name in _ONLY:
        if options[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --pairs")
    if output is not None and not run:
        raise click.UsageError("-o goes with --pairs or --run")
    if options["shard"] is not None and output is None:
        raise click.UsageError("--shard goes with -o")


def score_pairs(
    load: Callable[[], Reranker], files: tuple[Path, ...], options: dict[str, Any], **how: Any
) -> None:
    """Score files of pairs, with progress, and tell what was done.

    Args:
        load: opens the model.
        files: more of --pairs.
        options: values of `pairs_options`.
        how: arguments of `score_files`: raw, instruction, long_documents.
    """
    given = {name: options[name] for name in _ONLY if options[name] is not None}
    with resumable(), load() as reranker, progress_bars(lines=True) as progress:
        done = score_files(
            reranker,
            [*options["pairs"], *files],
            options["output"],
            **given,
            **how,
            shard=options["shard"],
            progress=progress,
        )
    before = f", {done.kept:,} of them scored before" if done.kept else ""
    there = f"; {len(done.there):,} were there" if done.there else ""
    notice(f"wrote {len(done.written):,} files of {done.rows:,} rows{before}{there}")
    if done.rejected:
        more = f" and {len(done.rejects) - 1} more" if len(done.rejects) > 1 else ""
        notice(
            f"{done.rejected:,} rows were left out; {done.rejects[0]}{more} "
            f"list{'' if more else 's'} them"
        )
