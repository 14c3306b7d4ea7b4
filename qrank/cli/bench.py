"""`qrank bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click

from qrank.cli.common import FiniteRange, InputFile, debug_option, policy_options
from qrank.cli.lazy import device_option
from qrank.cli.obtain import obtained, revision_option
from qrank.cli.plots import check_plot, plot_bench
from qrank.cli.spinner import spinner
from qrank.measure.bench import COUNTS, Row, chosen
from qrank.measure.bench import bench as run
from qrank.quality.records import Texts
from qrank.select.obtain import Wanted
from qrank.select.selection import Criteria, Policy, deprioritized
from qrank.system.machine import cpu_name, processors


@click.command()
@click.argument("bundle")
@revision_option
@click.option(
    "--documents",
    type=InputFile(),
    help="JSONL with id and text.  [default: synthetic documents of 128 tokens]",
)
@click.option("-q", "--query", help="Query to rank them for.  [default: a synthetic one]")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="onnx, openvino-int8, ...; can be repeated.  [default: every variant]",
)
@device_option("every one present")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option(
    "--seconds",
    type=FiniteRange(min=0),
    default=30,
    show_default=True,
    help="Time for each of the three sizes; no round starts after it, but 5 always run.",
)
@policy_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Plot speed against fidelity to a *.png or *.svg file.",
)
@debug_option
def bench(
    bundle: str,
    revision: str | None,
    documents: Path | None,
    query: str | None,
    backends: tuple[str, ...],
    device: str | None,
    threads: int | None,
    seconds: float,
    policy: Policy,
    min_kendall: float | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Time all targets of a bundle side by side.

    Requests rank 1, 20 and 100 documents. Each target runs in a separate process. They take turns,
    request by request, so that other load on the machine affects all of them equally. The one
    that --policy chooses is marked. The result is not stored; use qrank tune for that.

    \b
      qrank bench my-bundle --documents d.jsonl -q "how do plants make food?"
      qrank bench my-bundle --backend openvino --plot speed.svg
    """
    if plot is not None:
        check_plot(plot)
    located = obtained(bundle, revision, Wanted(backends, device))
    with spinner() as progress:
        rows = run(
            located,
            texts=None if documents is None else _texts(documents),
            query=query,
            threads=threads,
            backends=backends,
            device=device,
            seconds=seconds,
            progress=progress,
        )
    criteria = Criteria(policy=policy, min_kendall=min_kendall)
    best = chosen(rows, criteria, deprioritized(located.manifest, criteria))
    if as_json:
        content = [
            {**asdict(row), **asdict(row.target), "target": row.target.name, "chosen": row is best}
            for row in rows
        ]
        machine = {"cpu": cpu_name(), "processors": processors()}
        click.echo(json.dumps({"machine": machine, "targets": content}, indent=2))
    else:
        for line in _lines(rows, best):
            click.echo(line)
    if plot is not None:
        title = f"{Path(bundle).name}: {cpu_name()}, {threads or processors()} threads"
        plot_bench(rows, best, title, plot)


def _texts(documents: Path) -> list[str]:
    """The texts of the first documents, as many as the largest request ranks."""
    with closing(Texts(documents, "document")) as texts:
        return [texts[identity] for identity in islice(texts, max(COUNTS))]


def _lines(rows: Sequence[Row], best: Row | None) -> Iterator[str]:
    """Two tables of 80 columns or fewer."""
    usable = [row for row in rows if row.reason is None]
    names = {id(row): f"{row.target.name} {row.setting}".rstrip() for row in rows}
    width = max([len(name) for name in names.values()] + [6]) + 1
    yield (
        f"{'target':{width}}{'pairs/s':>8}{'tokens/s':>9}{'load s':>7}{'peak MB':>8}"
        f"{'MB':>6}{'tau':>7}{'nDCG':>7}"
    )
    for row in usable:
        mark = "*" if row is best else ""
        peak = "" if row.peak is None else f"{row.peak / 1e6:,.0f}"
        agreement = "" if row.agreement is None else f"{row.agreement:.4f}"
        yield (
            f"{names[id(row)] + mark:{width}}{row.pairs:>8.1f}{row.tokens:>9,.0f}"
            f"{row.load:>7.1f}{peak:>8}{row.bytes / 1e6:>6.0f}{row.kendall:>7.4f}{agreement:>7}"
        )
    yield ""
    heads = "".join(f"{f'{count} p50':>9}{'p95':>8}" for count in COUNTS)
    yield f"{'ms, by documents':{width}}{heads}"
    for row in usable:
        cells = "".join(f"{row.p50[count]:>9,.0f}{row.p95[count]:>8,.0f}" for count in COUNTS)
        yield f"{names[id(row)]:{width}}{cells}"
    if best is not None:
        yield f"\n* chosen; {min(best.rounds.values())} rounds or more in turns"
    for row in rows:
        if row.reason is not None:
            yield f"not used: {names[id(row)]}: {row.reason}"
