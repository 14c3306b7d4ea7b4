"""Options of the commands that read a test collection, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from qrank.cli.common import notice
from qrank.collection import Collection, Files, Run
from qrank.items import LongDocuments
from qrank.scored import Progress, Setting, no_progress

Command = TypeVar("Command", bound=Callable[..., Any])

EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)

_OPTIONS = (
    click.option(
        "--data",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with corpus.jsonl, queries.jsonl, qrels/test.tsv (BEIR), or documents.jsonl, "
        "queries.jsonl, qrels.trec.",
    ),
    click.option("--queries", type=EXISTING, help="JSONL with id and text."),
    click.option("--documents", type=EXISTING, help="JSONL with id and text."),
    click.option("--qrels", type=EXISTING, help="Judgements: TREC's four columns, or BEIR's TSV."),
    click.option("--run", type=EXISTING, help="The first stage as a TREC run.  [default: BM25]"),
    click.option(
        "--depth",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="Candidates of a query.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first so many queries."),
    click.option("--device", help="cpu, cuda, gpu, npu, metal, ...  [default: cpu]"),
    click.option(
        "--execution", help="fp32, bf16 or fp16.  [default: the fastest that is faithful]"
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]"),
    click.option("--max-length", type=int, help="Tokens of a pair.  [default: the model's limit]"),
    click.option("--instruction", help="What relevant means, where the model's family takes that."),
    click.option(
        "--long-documents",
        type=click.Choice(get_args(LongDocuments)),
        default="truncate",
        show_default=True,
        help="Read the beginning of a document that does not fit, its end, or its best part.",
    ),
)

_SETTING = ("device", "execution", "threads", "max_length", "instruction", "long_documents")
_FILES = ("queries", "documents", "qrels")


def data_options(command: Command) -> Command:
    """The options of a collection and of how it is scored; `read` takes what they give."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def setting(options: dict[str, Any]) -> Setting:
    """How targets are opened."""
    return Setting(**{name: options[name] for name in _SETTING})


@contextmanager
def collection(options: dict[str, Any]) -> Iterator[Collection]:
    """The collection that --data and the files name."""
    files = Files.find(options["data"], **{name: options[name] for name in _FILES})
    opened = Collection(files)
    try:
        yield opened
    finally:
        opened.close()


def candidates(collection: Collection, options: dict[str, Any]) -> tuple[str, Run]:
    """What the first stage is called, and what it found."""
    run, depth, limit = options["run"], options["depth"], options["limit"]
    if run is None:
        return "BM25", collection.bm25(depth, limit)
    found = collection.run(run, depth, limit)
    lacking = len(collection.queries) - len(found)
    if lacking and limit is None:
        notice(f"{run} has none of {lacking} judged queries, which are left out")
    return "first stage", found


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar a target on stderr, where that is a terminal; and what Ctrl-C leaves behind."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Bars(*columns, TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, Any] = {}

    def show(target: str, done: int, total: int) -> None:
        if target not in tasks:
            tasks[target] = bars.add_task(target, total=total)
        bars.update(tasks[target], completed=done)

    try:
        if not console.is_terminal:
            yield no_progress
            return
        with bars:
            yield show
    except KeyboardInterrupt:
        notice("stopped; what was scored is kept: the same command goes on from there")
        raise click.Abort from None
