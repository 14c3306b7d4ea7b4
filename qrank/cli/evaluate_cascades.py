"""The part of `qrank eval` that evaluates cascades of two models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qrank.cli.common import difference_cells
from qrank.cli.data import candidates, collection, setting
from qrank.cli.obtain import obtained
from qrank.cli.plots import check_plot, plot_cascades
from qrank.cli.progress import progress_bars
from qrank.quality.cascade_evaluation import TIMED, CascadeEvaluation
from qrank.quality.cascade_evaluation import evaluate_cascade as run
from qrank.quality.metrics import MEASURES
from qrank.select.obtain import Wanted


def evaluate_cascades(
    models: Sequence[str],
    revision: str | None,
    backends: Sequence[str],
    as_json: bool,
    plot: Path | None,
    options: dict[str, Any],
    *,
    keeps: Sequence[int],
    top_k: int,
    first_length: int | None,
) -> None:
    """Evaluate cascades, and print and plot the result.

    Args:
        models: the small and the large one.
        revision: must be None.
        backends: one for both, one for each, or none.
        as_json: print JSON.
        plot: a picture's file.
        options: values of `qrank.cli.data.data_options`.
        keeps: documents that the large one rescores, in each cascade.
        top_k: documents that the early exit settles.
        first_length: maximum tokens of a pair for the small one; None: as for the large one.

    Raises:
        UsageError: the options do not go together.
    """
    if len(models) > 2:
        raise click.UsageError(f"give one bundle, or a small and a large one, not {len(models)}")
    if revision is not None:
        raise click.UsageError("with two bundles, write owner/name@REVISION")
    if len(backends) > 2:
        raise click.UsageError("with two bundles, give --backend once or twice")
    chosen: list[str | None] = [None, None]
    if backends:
        chosen = [backends[0], backends[-1]]
    if plot is not None:
        check_plot(plot)
    own = setting(options)
    with collection(options) as opened:
        first, found = candidates(opened, options)
        located = [
            obtained(model, None, Wanted((backend,) if backend else (), options["device"]))
            for model, backend in zip(models, chosen, strict=True)
        ]
        with progress_bars() as progress:
            result = run(
                located,
                opened,
                found,
                [replace(own, max_length=first_length or own.max_length), own],
                first=first,
                backends=chosen,
                keeps=keeps,
                top_k=top_k,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(asdict(result), ensure_ascii=False, indent=2))
    else:
        _tables(result)
    if plot is not None:  # last: on a full disk, the figures are already printed
        plot_cascades(result, plot)


def _tables(result: CascadeEvaluation) -> None:
    """Print one row per run, and one per error, in 80 columns."""
    console = Console()
    table = _table("run", *MEASURES, "Δ nDCG@10", "p", "ms")
    for row in result.rows:
        table.add_row(
            Text(row.name),
            *(f"{value:.3f}" for value in row.measures.values()),
            *difference_cells(row.difference),
            "" if row.milliseconds is None else f"{row.milliseconds:,.0f}",
        )
    console.print(table)
    small, large = result.models
    pairs = ", ".join(f"{each:.1f}" for each in result.pair_ms)
    notes = [
        f"{result.queries} queries of {result.data}, at most {result.depth} candidates each. "
        f"keep N: {small} scores all, {large} its best N. Δ is against {large}.",
        f"ms: a query's time, composed of those of pairs ({pairs} ms), which were measured on "
        f"{TIMED} queries ({', '.join(result.targets)}).",
    ]
    if result.file is None:
        notes.append("No early exit: that takes 8 queries or more.")
    for note in notes:
        console.print(Text(note, style="dim"))
    if result.file is None:
        return
    console.print()
    table = _table("error", "rescored", f"same top {result.top_k}")
    for each in result.exits:
        known = each.rescored is not None and each.agreement is not None
        table.add_row(
            f"{each.error:g}",
            f"{each.rescored:.1f} of {result.keep}" if known else "too few queries",
            f"{each.agreement:.1%}" if known else "",
        )
    console.print(table)
    note = (
        f"Early exit (qrank cascade --error), fitted on {result.fit} queries and measured on "
        f"{result.held_out} others; kept in"
    )
    console.print(Text(note, style="dim"))
    click.echo(result.file)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, overflow="ellipsis", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
