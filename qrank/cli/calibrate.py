"""`qrank calibrate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from qrank.bundle.opened import Bundle
from qrank.cli.common import debug_option
from qrank.cli.data import candidates, collection, data_options, setting
from qrank.cli.obtain import obtained, revision_option, runs_checkpoint
from qrank.cli.progress import progress_bars
from qrank.quality.reliability import Part, Report
from qrank.quality.reliability import calibrate as run
from qrank.scoring.calibration import METHODS
from qrank.select.obtain import Wanted


@click.command()
@click.argument("bundle")
@revision_option
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="platt",
    show_default=True,
    help="Platt: two parameters. Isotonic: a step function, which needs many relevant pairs.",
)
@click.option("--backend", help="onnx, openvino-int8, ...  [default: what qrank score runs]")
@click.option(
    "--relevant",
    type=int,
    default=1,
    show_default=True,
    help="Lowest judgement that counts as relevant.",
)
@click.option(
    "--judged", is_flag=True, help="Use exactly the pairs in --qrels, without a first stage."
)
@data_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def calibrate(
    bundle: str,
    revision: str | None,
    method: str,
    backend: str | None,
    relevant: int,
    judged: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a bundle's scores to labelled pairs, as probabilities.

    A score of 0.8 then means relevant in 8 of 10 cases. BUNDLE is a bundled name, a folder or a hub
    id. The pairs are the candidates of the judged queries: the 100 best of BM25, or those of
    --run. A pair without a judgement counts as not relevant. The fit uses half of the queries;
    the other half measures its quality. The result is stored in your data folder for this
    variant: qrank score --scores calibrated.

    \b
      qrank calibrate my-bundle --data beir/scifact
      qrank score -m my-bundle --scores calibrated --min-score 0.3 -q QUERY FILE
    """
    if judged and options["runs"]:
        raise click.UsageError("--judged takes no --run")
    named = () if backend is None else (backend,)
    with collection(options) as opened:
        pairs = opened.judged(options["max_queries"]) if judged else candidates(opened, options)[1]
        located: Bundle | str = bundle
        if not runs_checkpoint(backend):
            wanted = Wanted(named, options["device"])
            located = obtained(bundle, revision, wanted, whole=False)
        elif revision is not None:
            raise click.UsageError("with --backend torch, write owner/name@REVISION")
        with progress_bars() as progress:
            report = run(
                located,
                opened,
                pairs,
                setting(options),
                backend=backend,
                method=method,
                relevant=relevant,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(asdict(report), ensure_ascii=False, indent=2))
        return
    for line in _lines(report):
        click.echo(line)


def _lines(report: Report) -> list[str]:
    before, after = report.before, report.after
    return [
        f"{report.model}, {report.target}, {report.method}, on {report.data}",
        f"fitted on {_part(report.fit)}",
        f"held out  {_part(report.held_out)}",
        "",
        "held out            before   after",
        f"Brier score         {before.brier:6.4f}  {after.brier:6.4f}",
        f"calibration error   {before.error:6.4f}  {after.error:6.4f}",
        "",
        "min-score    kept  precision  recall",
        *(
            f"{row.score:9.2f}  {row.kept:6}  "
            f"{'' if row.precision is None else f'{row.precision:.1%}':>9}  {row.recall:6.1%}"
            for row in report.thresholds
        ),
        "",
        f"kept in {report.file}",
    ]


def _part(part: Part) -> str:
    return f"{part.pairs} pairs of {part.queries} queries, {part.relevant} of them relevant"
