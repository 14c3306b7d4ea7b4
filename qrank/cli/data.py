"""Options of the commands that read a test collection, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qrank.cli.common import InputFile, notice
from qrank.cli.lazy import device_option
from qrank.quality.collection import Collection, Files, Run
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
    click.option("--queries", type=InputFile(), help="JSONL with id and text."),
    click.option("--documents", type=InputFile(), help="JSONL with id and text."),
    click.option(
        "--qrels", type=InputFile(), help="Judgements: TREC's four columns, or BEIR's TSV."
    ),
    click.option("--run", type=InputFile(), help="The first stage as a TREC run.  [default: BM25]"),
    click.option(
        "--depth",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="Candidates of a query.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first so many queries."),
    device_option("cpu"),
    click.option(
        "--compute-dtype", help="fp32, bf16 or fp16.  [default: the fastest that is faithful]"
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

_SETTING = ("device", "compute_dtype", "threads", "max_length", "instruction", "long_documents")
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
    """The collection that --data and the files name; what Ctrl-C leaves of its scores is told."""
    files = Files.find(options["data"], **{name: options[name] for name in _FILES})
    opened = Collection(files)
    try:
        yield opened
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "what was scored is kept, and the same command goes on from there"
        ) from None
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
