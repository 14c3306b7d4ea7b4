"""`qrank cascade`."""

from __future__ import annotations

from typing import Any

import click

from qrank.cascade import KEEP, Cascade
from qrank.cli.common import (
    FiniteRange,
    debug_option,
    first_length_option,
    opening_options,
    whole_numbers,
)
from qrank.cli.obtain import opened
from qrank.cli.ranking import (
    ASKED,
    how_options,
    rank_query,
    rank_run,
    run_of,
    run_options,
    what_options,
    write,
)


@click.command()
@what_options
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Bundled name, bundle folder or hub id; give two or more, the fastest first.",
)
@click.option(
    "--keep",
    default=str(KEEP),
    show_default=True,
    callback=whole_numbers,
    metavar="N[,N...]",
    help="Documents that the next model scores, the best of the one before.",
)
@click.option(
    "--error",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    help="Stop when the best are settled, except for this share of queries: as fitted by qrank "
    "eval; goes with --top-k.",
)
@first_length_option
@how_options
@opening_options
@run_options
@debug_option
def cascade(
    models: tuple[str, ...],
    keep: list[int],
    error: float | None,
    first_length: int | None,
    **opening: Any,
) -> None:
    """Rank with a small model, and the best of it with larger ones.

    The first --model scores all documents, and the next one the best --keep of them. Documents that
    it does not score follow in the order of the first; the column "stage" tells which model a score
    is of, from 0. The other options are those of qrank score, and go for all models; --budget-ms is
    the time of all models together.

    \b
      qrank cascade -m my-small -m mini -q "what do plants eat?" passages.txt
      qrank cascade -m my-small -m mini --keep 5 --budget-ms 200 -q QUERY FILE
    """
    asked = {name: opening.pop(name) for name in ASKED}
    if error is not None and asked["top_k"] is None:
        raise click.UsageError("--error goes with --top-k: what is settled are the best")
    if asked["raw"] and opening["calibrated"]:
        raise click.UsageError("--raw prints logits: give --scores calibrated or --raw")

    def load() -> Cascade:
        first = {**opening, "max_length": first_length or opening["max_length"]}
        rerankers = [
            opened(model, None, **(opening if place else first))
            for place, model in enumerate(models)
        ]
        return Cascade(rerankers, keep[0] if len(keep) == 1 else keep, error=error)

    if asked["runs"]:
        if opening["calibrated"]:
            raise click.UsageError("--run writes logits: it takes no --scores")
        rank_run(load, run_of(asked, {}), asked)
        return
    used, ranking, results = rank_query(load, asked)
    models_ = [each.engine.manifest.name for each in used.rerankers]
    write(asked, results, ranking, models_, [each.target.name for each in used.rerankers])
