"""`qrank eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qrank.cli.common import (
    debug_option,
    difference_cells,
    first_length_option,
    notice,
    whole_numbers,
)
from qrank.cli.data import candidates, collection, data_options, setting
from qrank.cli.evaluate_cascades import evaluate_cascades
from qrank.cli.obtain import obtained, revision_option
from qrank.cli.plots import check_plot, plot_evaluation
from qrank.cli.progress import progress_bars
from qrank.quality.cascade_evaluation import KEEPS
from qrank.quality.evaluation import AGREEMENT, WITHIN, Evaluation
from qrank.quality.evaluation import evaluate as run
from qrank.quality.metrics import MEASURES
from qrank.select.obtain import Wanted


@click.command("eval")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE [LARGE]")
@revision_option
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="onnx, openvino-int8, ...; can be repeated.  [default: every variant]",
)
@click.option(
    "--keep",
    "keeps",
    callback=whole_numbers,
    metavar="N[,N...]",
    help=f"With LARGE: documents that it rescores.  [default: {','.join(map(str, KEEPS))}]",
)
@first_length_option
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="With LARGE: documents that an early exit settles.  [default: 10]",
)
@click.option(
    "--reference",
    help="Checkpoint to compare with, run with torch on the CPU.  [default: the bundle's fp32 "
    "variant]",
)
@click.option("--family", help="With --reference: the checkpoint's family card.")
@data_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also plot the result to a *.png or *.svg file.",
)
@debug_option
def evaluate(
    bundles: tuple[str, ...],
    revision: str | None,
    backends: tuple[str, ...],
    keeps: list[int] | None,
    first_length: int | None,
    top_k: int | None,
    reference: str | None,
    family: str | None,
    as_json: bool,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure how well each variant ranks, and its loss to fp32.

    BUNDLE is a bundled name, a folder or a hub id. Every variant reranks the candidates of every
    judged query: the 100 best of BM25, or those of --run. Scores are kept, so the same command
    continues after Ctrl-C.

    With two bundles, a small and a LARGE one, it is measured how well and how fast cascades of them
    rank, and an early exit of qrank cascade is fitted. --backend names one of each, or one for
    both.

    \b
      qrank eval my-bundle --data beir/scifact
      qrank eval my-small my-bundle --keep 10,20,50 --data beir/scifact
      qrank eval my-bundle --queries q.jsonl --documents d.jsonl --qrels q.trec
    """
    if len(bundles) > 1:
        if reference is not None or family is not None:
            raise click.UsageError("--reference and --family go with one bundle")
        evaluate_cascades(
            bundles,
            revision,
            backends,
            as_json,
            plot,
            options,
            keeps=keeps or list(KEEPS),
            top_k=top_k or 10,
            first_length=first_length,
        )
        return
    if any(given is not None for given in (keeps, top_k, first_length)):
        raise click.UsageError("--keep, --top-k and --first-length go with two bundles")
    (bundle,) = bundles
    if family is not None and reference is None:
        raise click.UsageError("--family goes with --reference")
    if plot is not None:
        check_plot(plot)
    with collection(options) as opened:
        first, found = candidates(opened, options)
        located = obtained(bundle, revision, Wanted(backends, options["device"]))
        with progress_bars() as progress:
            result = run(
                located,
                opened,
                found,
                setting(options),
                first=first,
                backends=backends,
                reference=reference,
                family=family,
                progress=progress,
            )
    for name, reason in result.failed.items():
        notice(f"left out {name}: {reason}")
    if as_json:
        click.echo(json.dumps(asdict(result), ensure_ascii=False, indent=2))
    else:
        _table(result)
    if result.agreement is not None and result.agreement < AGREEMENT:
        notice(
            f"warning: only {result.agreement:.0%} of the reranked top 10 are in the first "
            f"stage's top {WITHIN}: it finds other things than the reranker wants; is its "
            "embedder made for this work?"
        )
    if plot is not None:  # last: on a full disk, the figures are already printed
        plot_evaluation(result, plot)


def _table(result: Evaluation) -> None:
    """Print one row per run, in 80 columns: variant names have 18 letters at most."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="ellipsis", no_wrap=True)
    for name in (*MEASURES, "Δ nDCG@10", "p", "tau", "top10"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        difference = row.difference
        table.add_row(
            Text(row.name),
            *(f"{value:.3f}" for value in row.measures.values()),
            *difference_cells(difference),
            "" if row.kendall is None else f"{row.kendall:.3f}",
            "" if row.overlap is None else f"{row.overlap:.0%}",
        )
    console = Console()
    console.print(table)
    notes = [
        f"{result.model}: {result.queries} queries of {result.data}, at most {result.depth} "
        f"candidates each, with {result.recall:.1%} of what is relevant.",
        f"Δ (± half its 95% interval, paired t-test), tau and top10 (shared) are against "
        f"{result.reference}: {result.why}.",
    ]
    if result.agreement is not None:
        notes.append(
            f"{result.agreement:.0%} of the reranked top 10 are in the first stage's top {WITHIN}."
        )
    if before := sum(row.before for row in result.rows):
        notes.append(f"{before} rankings were scored before and kept.")
    for note in notes:
        console.print(Text(note, style="dim"))
