"""The part of `qrank score` that reads files of pairs and writes files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qrank.cli.common import notice, resumable
from qrank.cli.progress import progress_bars
from qrank.errors import InputError
from qrank.pairs.job import ROWS, OnError
from qrank.pairs.plan import Shard
from qrank.pairs.score import ScoredFiles, score_files
from qrank.reranker import Reranker
from qrank.system.extras import need

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
    click.option(
        "--engine",
        type=click.Choice(["ray"]),
        help="With --pairs: score on all nodes of a Ray cluster, which need the files, -o and the "
        "model's folder at the same paths.",
    ),
    click.option(
        "--address",
        help="With --engine ray: of the cluster; local starts one on this machine.  "
        "[default: auto, a running one]",
    ),
    click.option(
        "--shards",
        type=click.IntRange(min=1),
        help="With --engine ray: cut the rows of all files into N parts.  [default: whole files]",
    ),
)

_ONLY = ("query_column", "document_column", "score_column", "on_error", "rows")
"""Arguments of `score_files`, with its defaults; they only go with --pairs."""

_ON_RAY = ("address", "shards")
"""Parameters that only go with --engine ray."""

PAIRS = ("pairs", "output", "shard", "engine", *_ON_RAY, *_ONLY)
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
    for name in _ON_RAY:
        if options[name] is not None and options["engine"] is None:
            raise click.UsageError(f"--{name} goes with --engine ray")
    if options["engine"] is not None and options["shard"] is not None:
        raise click.UsageError("--engine does all shards: give --shards N instead of --shard")
    if pairs and output is None:
        raise click.UsageError("--pairs goes with -o FOLDER")
    if pairs:
        for name, value in others.items():
            if value is not None and value is not False:
                raise click.UsageError(f"--pairs takes no {name}")
        return
    for name in ("engine", *_ONLY):
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
    with resumable(), load() as reranker, progress_bars(lines=True) as progress:
        done = score_files(
            reranker,
            [*options["pairs"], *files],
            options["output"],
            **_given(options),
            **how,
            shard=options["shard"],
            progress=progress,
        )
    _tell(done)


def score_on_ray(
    model: str,
    opening: dict[str, Any],
    files: tuple[Path, ...],
    options: dict[str, Any],
    **how: Any,
) -> None:
    """The same on the nodes of a Ray cluster; `opening` are other arguments of `Reranker`."""
    need("ray")
    from qrank.integrations import ray_files

    with resumable(), progress_bars(lines=True) as progress:
        done = ray_files.score_files(
            [*options["pairs"], *files],
            options["output"],
            model=model,
            # Each node would convert it for itself.
            options={**opening, "convert": False},
            **{name: options[name] for name in _ON_RAY},
            **_given(options),
            **how,
            progress=progress,
        )
    _tell(done)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _ONLY if options[name] is not None}


def _tell(done: ScoredFiles) -> None:
    before = f", {done.kept:,} of them scored before" if done.kept else ""
    there = f"; {len(done.there):,} were there" if done.there else ""
    notice(f"wrote {len(done.written):,} files of {done.rows:,} rows{before}{there}")
    if done.rejected:
        more = f" and {len(done.rejects) - 1} more" if len(done.rejects) > 1 else ""
        notice(
            f"{done.rejected:,} rows were left out; {done.rejects[0]}{more} "
            f"list{'' if more else 's'} them"
        )
