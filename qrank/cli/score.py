"""`qrank score`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import click

from qrank.bundle.locate import DEFAULT
from qrank.cli.common import (
    FiniteFloat,
    FiniteRange,
    InputFile,
    debug_option,
    notice,
    opening_options,
    resumable,
)
from qrank.cli.obtain import opened, revision_option
from qrank.cli.output import WRITERS, Result
from qrank.cli.pairs import PAIRS, pairs_options, score_on_ray, score_pairs
from qrank.cli.pairs import check as check_pairs
from qrank.cli.progress import progress_bars
from qrank.cli.tune import measure as measure_targets
from qrank.pairs.plan import Shard
from qrank.quality.records import text_of
from qrank.quality.rerank_run import RunReranker
from qrank.quality.run_output import rerank_into
from qrank.reranker import Reranker
from qrank.scoring.inputs import LongDocuments
from qrank.system.safejson import parse_object
from qrank.system.textfiles import STANDARD_INPUT, TextFile


@click.command()
@click.option("-q", "--query", help="Query to rank the documents for.")
@click.argument("files", nargs=-1, type=InputFile())
@click.option("--instruction", help="What relevant means, for models that take an instruction.")
@click.option("-m", "--model", help=f"Bundled name, bundle folder or hub id.  [default: {DEFAULT}]")
@revision_option
@click.option(
    "--jsonl", is_flag=True, help='Lines are JSON objects with a "text" and an optional "title".'
)
@click.option(
    "-f",
    "--format",
    type=click.Choice(list(WRITERS)),
    help="Output format.  [default: table on a terminal, tsv in a pipe]",
)
@click.option("-k", "--top-k", type=click.IntRange(min=0), help="Print only the best N.")
@click.option("--min-score", type=FiniteFloat(), help="Omit documents that score lower.")
@click.option("--raw", is_flag=True, help="Print logits, without the model's activation.")
@opening_options
@click.option(
    "--measure/--no-measure",
    default=None,
    help="If the targets have not been measured (qrank tune), measure them first, or guess "
    "without a notice.  [default: guess, with a notice on a terminal]",
)
@click.option("--family", help="The checkpoint's family card, if it does not identify itself.")
@click.option(
    "--long-documents",
    type=click.Choice(get_args(LongDocuments)),
    default="truncate",
    show_default=True,
    help="Of a document that is too long, read the beginning, the end, or the best part.",
)
@click.option(
    "--budget-ms",
    type=FiniteRange(min=0, min_open=True),
    help="Time limit per query in milliseconds. Scores as many of the first documents as fit; "
    "the others follow in their order.",
)
@click.option("--run", type=InputFile(), help="Rerank this TREC run, grouped by query.")
@click.option("--queries", type=InputFile(), help="With --run: JSONL or Parquet with id and text.")
@click.option(
    "--documents", type=InputFile(), help="With --run: JSONL or Parquet with id and text."
)
@pairs_options
@debug_option
def score(
    query: str | None,
    files: tuple[Path, ...],
    instruction: str | None,
    model: str | None,
    revision: str | None,
    jsonl: bool,
    format: str | None,
    top_k: int | None,
    min_score: float | None,
    raw: bool,
    measure: bool | None,
    long_documents: LongDocuments,
    budget_ms: float | None,
    run: Path | None,
    queries: Path | None,
    documents: Path | None,
    **opening: Any,
) -> None:
    """Rank documents for a query, most relevant first.

    Each line of FILES or of standard input (-) is a document, blank lines included. --run,
    --queries and --documents rerank a whole TREC run. All files may be pipes, and may be
    compressed with gzip, bzip2, xz or zstd.

    --pairs scores the rows of tables: each file with a column of queries and one of documents
    becomes a file in the folder -o, with a column of scores.

    A checkpoint on the hub is converted on first use, to the variant expected to be fastest here,
    and kept in your data folder (qrank models). That takes: pip install "qrank[convert]".

    \b
      qrank score -q "how do plants make food?" passages.txt
      qrank score -m BAAI/bge-reranker-base -q "which planet is red?" notes.txt
      grep -i plant notes.txt | qrank score -q "how do plants make food?" -k 5
      qrank score --run bm25.trec --queries q.jsonl --documents d.jsonl > new.trec
      qrank score --pairs 'in/*.parquet' --document-column text -o out
      qrank score --pairs 'in/*.parquet' -o out --engine ray
    """
    tables = {name: opening.pop(name) for name in PAIRS}
    others: dict[str, object] = {
        "-q": query,
        "--jsonl": jsonl,
        "--format": format,
        "--top-k": top_k,
        "--min-score": min_score,
        "--budget-ms": budget_ms,
        "--run": run,
        "--queries": queries,
        "--documents": documents,
    }
    check_pairs(tables, others, run=run is not None)
    if model is None:
        notice(f"no --model given: using the bundled {DEFAULT}")

    def load() -> Reranker:
        reranker = opened(model or DEFAULT, revision, **opening)
        choice = reranker.choice
        if choice.measured or choice.among == 1 or measure is False:
            return reranker
        if measure:
            reranker.close()
            measure_targets(reranker.engine.bundle, opening["threads"], None)
            return Reranker(reranker.engine.bundle, **opening)
        if sys.stderr.isatty():
            notice(
                f"not measured here yet: guessing that {choice.target.name} is the fastest of "
                f"{choice.among}; to measure: qrank tune {model or DEFAULT}"
            )
        return reranker

    if raw and opening["calibrated"]:
        raise click.UsageError("--raw prints logits: give --scores calibrated or --raw")
    if tables["pairs"]:
        how = {"raw": raw, "instruction": instruction, "long_documents": long_documents}
        if tables["engine"] is None:
            score_pairs(load, files, tables, **how)
        elif measure:
            raise click.UsageError("--engine takes no --measure: run qrank tune on one node")
        else:
            score_on_ray(model or DEFAULT, {**opening, "revision": revision}, files, tables, **how)
        return
    if run is not None:
        if queries is None or documents is None:
            raise click.UsageError("--run goes with --queries and --documents")
        if query is not None or files or jsonl or min_score is not None or raw:
            raise click.UsageError("--run takes no -q, FILES, --jsonl, --min-score or --raw")
        if opening["calibrated"]:
            raise click.UsageError("--run writes logits: it takes no --scores")
        if format not in (None, "trec"):
            raise click.UsageError("--run writes a TREC run: --format trec")
        output, shard = tables["output"], tables["shard"]
        if output is not None and budget_ms is not None:
            raise click.UsageError("-o takes no --budget-ms: its outputs do not depend on time")
        reader = RunReranker(run, queries, documents)
        if output is None:
            _score_run(load, reader, top_k, instruction, long_documents, budget_ms)
        else:
            _write_run(load, reader, output, shard, top_k, instruction, long_documents)
        return
    if query is None:
        raise click.UsageError("give a query with -q, or a run with --run")
    if not files and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("give FILES, or documents on standard input")
    lines = list(_lines(files or [STANDARD_INPUT], jsonl))
    with load() as reranker:
        ranking = reranker.rank(
            query,
            [text for text, _ in lines],
            top_k=top_k,
            instruction=instruction,
            long_documents=long_documents,
            budget_ms=budget_ms,
        )
    if not lines:
        notice("there is no document to rank")
    _tell_what_was_left(
        len(lines),
        ranking.scored_count,
        len(ranking),
        sum(item.truncated for item in ranking),
        long_documents,
    )
    results = [
        Result(item, item.logit if raw else item.score, lines[item.index][1]) for item in ranking
    ]
    if min_score is not None:
        results = [result for result in results if result.score >= min_score]
    chosen = format or ("table" if sys.stdout.isatty() else "tsv")
    scored_count = None if budget_ms is None else ranking.scored_count
    WRITERS[chosen](results, reranker.engine.manifest.name, reranker.target.name, scored_count)


def _score_run(
    load: Callable[[], Reranker],
    run: RunReranker,
    top_k: int | None,
    instruction: str | None,
    long_documents: LongDocuments,
    budget_ms: float | None,
) -> None:
    with closing(run), load() as reranker:
        reranked = run.rerank(
            reranker,
            top_k=top_k,
            instruction=instruction,
            long_documents=long_documents,
            budget_ms=budget_ms,
        )
        with progress_bars(beside_results=True) as progress:
            progress("reranking", 0, run.count)
            for done, lines in enumerate(reranked, 1):
                if lines:
                    click.echo("\n".join(lines))
                progress("reranking", done, run.count)
        _tell_what_was_left(run.documents, run.scored, run.shown, run.truncated, long_documents)


def _write_run(
    load: Callable[[], Reranker],
    run: RunReranker,
    folder: Path,
    shard: Shard | None,
    top_k: int | None,
    instruction: str | None,
    long_documents: LongDocuments,
) -> None:
    with closing(run), resumable(), load() as reranker, progress_bars(lines=True) as progress:
        output, before = rerank_into(
            folder,
            run,
            reranker,
            shard=shard,
            top_k=top_k,
            instruction=instruction,
            long_documents=long_documents,
            progress=progress,
        )
    kept = f", {before:,} queries of it reranked before" if before else ""
    notice(f"{output}{kept}")
    _tell_what_was_left(run.documents, run.scored, run.shown, run.truncated, long_documents)


def _tell_what_was_left(
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
