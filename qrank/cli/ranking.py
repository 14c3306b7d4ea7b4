"""What `qrank score` and `qrank cascade` share: a query and documents, or a run, to rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qrank.cascade import Cascade
from qrank.cli.common import FiniteRange, InputFile, notice
from qrank.cli.output import WRITERS, Result
from qrank.cli.progress import progress_bars
from qrank.quality.records import text_of
from qrank.quality.rerank_run import RunReranker
from qrank.reranker import Reranker
from qrank.scoring.inputs import LongDocuments
from qrank.scoring.ranking import Rankings
from qrank.system.safejson import parse_object
from qrank.system.textfiles import STANDARD_INPUT, TextFile

Command = TypeVar("Command", bound=Callable[..., Any])
Model = TypeVar("Model", Reranker, Cascade)

_WHAT = (
    click.option("-q", "--query", help="Query to rank the documents for."),
    click.argument("files", nargs=-1, type=InputFile()),
    click.option("--instruction", help="What relevant means, for models that take an instruction."),
)
_HOW = (
    click.option(
        "--jsonl",
        is_flag=True,
        help='Lines are JSON objects with a "text" and an optional "title".',
    ),
    click.option(
        "-f",
        "--format",
        type=click.Choice(list(WRITERS)),
        help="Output format.  [default: table on a terminal, tsv in a pipe]",
    ),
    click.option("-k", "--top-k", type=click.IntRange(min=0), help="Print only the best N."),
    click.option("--raw", is_flag=True, help="Print logits, without the model's activation."),
)
_RUN = (
    click.option(
        "--long-documents",
        type=click.Choice(get_args(LongDocuments)),
        default="truncate",
        show_default=True,
        help="Of a document that is too long, read the beginning, the end, or the best part.",
    ),
    click.option(
        "--budget-ms",
        type=FiniteRange(min=0, min_open=True),
        help="Time limit per query in milliseconds. Scores as many of the first documents as fit; "
        "the others follow in their order.",
    ),
    click.option(
        "--run",
        "runs",
        multiple=True,
        type=InputFile(),
        help="Rerank this TREC run, grouped by query.",
    ),
    click.option(
        "--rrf",
        is_flag=True,
        help="Fuse several --run by reciprocal ranks first.",
    ),
    click.option(
        "--queries", type=InputFile(), help="With --run: JSONL or Parquet with id and text."
    ),
    click.option(
        "--documents", type=InputFile(), help="With --run: JSONL or Parquet with id and text."
    ),
)

ASKED = (
    *("query", "files", "instruction", "jsonl", "format", "top_k", "raw"),
    *("long_documents", "budget_ms", "runs", "rrf", "queries", "documents"),
)
"""Parameters of the three groups of options."""

_RANK = ("top_k", "instruction", "long_documents", "budget_ms")
"""Those of `Reranker.rank`."""


def _added(command: Command, options: Iterable[Callable[[Any], Any]]) -> Command:
    for option in reversed([*options]):
        command = option(command)
    return command


def what_options(command: Command) -> Command:
    """`--query`, FILES and `--instruction`."""
    return _added(command, _WHAT)


def how_options(command: Command) -> Command:
    """`--jsonl`, `--format`, `--top-k` and `--raw`."""
    return _added(command, _HOW)


def run_options(command: Command) -> Command:
    """`--long-documents`, `--budget-ms`, and a run with its texts."""
    return _added(command, _RUN)


def check_runs(runs: tuple[Path, ...], *, rrf: bool) -> None:
    """Refuse several runs without `--rrf`, and the reverse."""
    if len(runs) > 1 and not rrf:
        raise click.UsageError(f"{len(runs)} times --run: --rrf fuses them")
    if rrf and len(runs) < 2:
        raise click.UsageError("--rrf goes with two --run or more")


def run_of(asked: dict[str, Any], others: dict[str, object]) -> RunReranker:
    """The run to rerank.

    Args:
        asked: values of the options above.
        others: name -> value of other options that do not go with --run.

    Raises:
        UsageError: options do not go together.
    """
    runs, queries, documents = asked["runs"], asked["queries"], asked["documents"]
    check_runs(runs, rrf=asked["rrf"])
    if queries is None or documents is None:
        raise click.UsageError("--run goes with --queries and --documents")
    refused = {
        "-q": asked["query"],
        "FILES": asked["files"],
        "--jsonl": asked["jsonl"],
        **others,
        "--raw": asked["raw"],
    }
    if any(value is not None and value != () and value is not False for value in refused.values()):
        *names, last = refused
        raise click.UsageError(f"--run takes no {', '.join(names)} or {last}")
    if asked["format"] not in (None, "trec"):
        raise click.UsageError("--run writes a TREC run: --format trec")
    return RunReranker(runs, queries, documents)


def rank_run(load: Callable[[], Model], run: RunReranker, asked: dict[str, Any]) -> None:
    """Rerank a run and print it.

    Args:
        load: opens the model.
        run: of `run_of`.
        asked: values of the options above.
    """
    with closing(run), load() as reranker:
        reranked = run.rerank(reranker, **{name: asked[name] for name in _RANK})
        with progress_bars(beside_results=True) as progress:
            progress("reranking", 0, run.count)
            for done, lines in enumerate(reranked, 1):
                if lines:
                    click.echo("\n".join(lines))
                progress("reranking", done, run.count)
        tell_what_was_left(
            run.documents, run.scored, run.shown, run.truncated, asked["long_documents"]
        )


def rank_query(
    load: Callable[[], Model], asked: dict[str, Any]
) -> tuple[Model, Rankings, list[Result]]:
    """Rank the documents of a query, and tell what was left.

    Args:
        load: opens the model.
        asked: values of the options above.

    Returns:
        The model, which is closed; the ranking; and what to print.

    Raises:
        UsageError: there is no query, or there are no documents.
    """
    query, files = asked["query"], asked["files"]
    if asked["rrf"]:
        check_runs((), rrf=True)
    if query is None:
        raise click.UsageError("give a query with -q, or a run with --run")
    if not files and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("give FILES, or documents on standard input")
    lines = list(_lines(files or [STANDARD_INPUT], asked["jsonl"]))
    with load() as reranker:
        ranking = reranker.rank(
            query, [text for text, _ in lines], **{name: asked[name] for name in _RANK}
        )
    if not lines:
        notice("there is no document to rank")
    tell_what_was_left(
        len(lines),
        ranking.scored_count,
        len(ranking),
        sum(item.truncated for item in ranking),
        asked["long_documents"],
    )
    results = [
        Result(item, item.logit if asked["raw"] else item.score, lines[item.index][1])
        for item in ranking
    ]
    return reranker, ranking, results


def write(
    asked: dict[str, Any],
    results: list[Result],
    ranking: Rankings,
    model: str | list[str],
    target: str | list[str],
) -> None:
    """Print results in the format that was asked for; several models are those of a cascade."""
    chosen = asked["format"] or ("table" if sys.stdout.isatty() else "tsv")
    scored_count = None if asked["budget_ms"] is None else ranking.scored_count
    WRITERS[chosen](results, model, target, scored_count)


def tell_what_was_left(
    documents: int, scored: int, shown: int, truncated: int, long_documents: LongDocuments
) -> None:
    """Print notices about documents that were not scored, or not read whole."""
    if scored < documents:
        notice(
            f"scored {scored} of the {documents} documents within the budget; "
            "the others follow in their given order"
        )
    if truncated:
        read = "end" if long_documents == "tail" else "beginning"
        notice(
            f"{truncated} of the {shown} documents shown did not fit and only their {read} "
            "was read; --long-documents chunk reads them whole"
        )


def _lines(files: Iterable[Path], jsonl: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's text, and its JSON object; {} for plain lines."""
    for path in files:
        with TextFile(path) as file:
            for number, line in file:
                if not jsonl:
                    yield line, {}
                    continue
                where = f"{file.name}, line {number}"
                record = parse_object(line, where, 'a JSON object with a "text"')
                yield text_of(record, "document", where), record
