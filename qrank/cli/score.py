"""`qrank score`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from qrank.bundle.locate import DEFAULT
from qrank.cli.common import FiniteFloat, debug_option, notice, opening_options, resumable
from qrank.cli.obtain import opened, revision_option
from qrank.cli.pairs import PAIRS, pairs_options, score_on_ray, score_pairs
from qrank.cli.pairs import check as check_pairs
from qrank.cli.progress import progress_bars
from qrank.cli.ranking import (
    ASKED,
    how_options,
    rank_query,
    rank_run,
    run_of,
    run_options,
    tell_what_was_left,
    what_options,
    write,
)
from qrank.cli.tune import measure as measure_targets
from qrank.pairs.plan import Shard
from qrank.quality.rerank_run import RunReranker
from qrank.quality.run_output import rerank_into
from qrank.reranker import Reranker


@click.command()
@what_options
@click.option("-m", "--model", help=f"Bundled name, bundle folder or hub id.  [default: {DEFAULT}]")
@revision_option
@how_options
@click.option("--min-score", type=FiniteFloat(), help="Omit documents that score lower.")
@opening_options
@click.option(
    "--measure/--no-measure",
    default=None,
    help="If the targets have not been measured (qrank tune), measure them first, or guess "
    "without a notice.  [default: guess, with a notice on a terminal]",
)
@click.option("--family", help="The checkpoint's family card, if it does not identify itself.")
@run_options
@pairs_options
@debug_option
def score(
    model: str | None,
    revision: str | None,
    min_score: float | None,
    measure: bool | None,
    **opening: Any,
) -> None:
    """Rank documents for a query, most relevant first.

    Each line of FILES or of standard input (-) is a document, blank lines included. --run,
    --queries and --documents rerank a whole TREC run, or several that --rrf fuses. All files may
    be pipes, and may be compressed with gzip, bzip2, xz or zstd.

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
    asked = {name: opening.pop(name) for name in ASKED}
    runs, raw = asked["runs"], asked["raw"]
    others: dict[str, object] = {
        "-q": asked["query"],
        "--jsonl": asked["jsonl"],
        "--format": asked["format"],
        "--top-k": asked["top_k"],
        "--min-score": min_score,
        "--budget-ms": asked["budget_ms"],
        "--run": runs or None,
        "--rrf": asked["rrf"],
        "--queries": asked["queries"],
        "--documents": asked["documents"],
    }
    check_pairs(tables, others, run=bool(runs))
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
        how = {name: asked[name] for name in ("raw", "instruction", "long_documents")}
        files = asked["files"]
        if tables["engine"] is None:
            score_pairs(load, files, tables, **how)
        elif measure:
            raise click.UsageError("--engine takes no --measure: run qrank tune on one node")
        else:
            score_on_ray(model or DEFAULT, {**opening, "revision": revision}, files, tables, **how)
        return
    if runs:
        output, shard = tables["output"], tables["shard"]
        if opening["calibrated"]:
            raise click.UsageError("--run writes logits: it takes no --scores")
        if output is not None and asked["budget_ms"] is not None:
            raise click.UsageError("-o takes no --budget-ms: its outputs do not depend on time")
        run = run_of(asked, {"--min-score": min_score})
        if output is None:
            rank_run(load, run, asked)
        else:
            _write_run(load, run, output, shard, asked)
        return
    reranker, ranking, results = rank_query(load, asked)
    if min_score is not None:
        results = [result for result in results if result.score >= min_score]
    write(asked, results, ranking, reranker.engine.manifest.name, reranker.target.name)


def _write_run(
    load: Callable[[], Reranker],
    run: RunReranker,
    folder: Path,
    shard: Shard | None,
    asked: dict[str, Any],
) -> None:
    with closing(run), resumable(), load() as reranker, progress_bars(lines=True) as progress:
        output, before = rerank_into(
            folder,
            run,
            reranker,
            shard=shard,
            top_k=asked["top_k"],
            instruction=asked["instruction"],
            long_documents=asked["long_documents"],
            progress=progress,
        )
    kept = f", {before:,} queries of it reranked before" if before else ""
    notice(f"{output}{kept}")
    left = (run.documents, run.scored, run.shown, run.truncated)
    tell_what_was_left(*left, asked["long_documents"])
