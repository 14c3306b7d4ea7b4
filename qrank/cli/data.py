"""Options of the commands that read a test collection, and the objects made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qrank.cli.common import InputFile, notice, resumable, run_options
from qrank.cli.ranking import check_runs
from qrank.cli.spinner import spinner
from qrank.quality.bm25 import Run
from qrank.quality.collection import Collection, Files
from qrank.quality.score_cache import Setting
from qrank.scoring.inputs import LongDocuments

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--data",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with corpus.jsonl, queries.jsonl, qrels/test.tsv (BEIR), or documents.jsonl, "
        "queries.jsonl, qrels.trec.",
    ),
    click.option("--queries", type=InputFile(), help="JSONL or Parquet with id and text."),
    click.option("--documents", type=InputFile(), help="JSONL or Parquet with id and text."),
    click.option(
        "--qrels", type=InputFile(), help="Judgements: TREC's four columns, or BEIR's TSV."
    ),
    click.option(
        "--run",
        "runs",
        multiple=True,
        type=InputFile(),
        help="First stage, as a TREC run.  [default: BM25]",
    ),
    click.option("--rrf", is_flag=True, help="Fuse several --run by reciprocal ranks first."),
    click.option(
        "--depth",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="Candidates per query.",
    ),
    click.option("--max-queries", type=click.IntRange(min=1), help="Use only the first N queries."),
    run_options,
    click.option("--instruction", help="What relevant means, for models that take an instruction."),
    click.option(
        "--long-documents",
        type=click.Choice(get_args(LongDocuments)),
        default="truncate",
        show_default=True,
        help="Of a document that is too long, read the beginning, the end, or the best part.",
    ),
)

_SETTING = ("device", "compute_dtype", "threads", "max_length", "instruction", "long_documents")
_FILES = ("queries", "documents", "qrels")


def data_options(command: Command) -> Command:
    """Options that name a collection and say how it is scored, for the functions below."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def setting(options: dict[str, Any]) -> Setting:
    """How to open targets, from the options."""
    return Setting(**{name: options[name] for name in _SETTING})


@contextmanager
def collection(options: dict[str, Any]) -> Iterator[Collection]:
    """Open the collection that --data and the files name; Ctrl-C says that scores are kept."""
    files = Files.find(options["data"], **{name: options[name] for name in _FILES})
    opened = Collection(files)
    try:
        with resumable():
            yield opened
    finally:
        opened.close()


def candidates(collection: Collection, options: dict[str, Any]) -> tuple[str, Run]:
    """The name of the first stage, and its candidates."""
    runs, depth, most = options["runs"], options["depth"], options["max_queries"]
    check_runs(runs, rrf=options["rrf"])
    if not runs:
        with spinner() as progress:
            progress("finding candidates by BM25")
            return "BM25", collection.bm25(depth, most)
    found = collection.run(*runs, depth=depth, max_queries=most)
    lacking = len(collection.queries) - len(found)
    if lacking and most is None:
        has = f"{runs[0]} has" if len(runs) == 1 else f"{len(runs)} runs have"
        notice(f"{has} none of {lacking} judged queries, which are left out")
    return "first stage", found
