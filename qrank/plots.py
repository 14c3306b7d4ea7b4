"""Pictures of results, as PNG or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qrank.errors import InputError
from qrank.evaluation import Evaluation
from qrank.extras import need
from qrank.measures import MAIN

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """See, before anything is measured, that a plot can be drawn.

    Raises:
        InputError: its file is neither *.png nor *.svg, or its folder is not there.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"a plot is *.png or *.svg, not {path.name}")
    if not path.parent.is_dir():
        raise InputError(f"no folder {path.parent} for the plot")
    need("matplotlib")


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """nDCG@10 of each run, with the interval of its difference to the reference."""
    figure: Any = need("matplotlib.figure")
    rows = evaluation.rows[::-1]
    drawing = figure.Figure(figsize=(8, 1.4 + 0.4 * len(rows)), layout="constrained")
    axes = drawing.add_subplot()
    for place, row in enumerate(rows):
        value = row.measures[MAIN]
        margin = row.difference.margin if row.difference else None
        reference = row.name == evaluation.reference
        axes.errorbar(
            value,
            place,
            xerr=margin,
            fmt="D" if reference else "o",
            color="black" if reference else "tab:blue",
            capsize=4,
        )
        if reference:
            axes.axvline(value, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{value:.3f}",
            (value, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            bbox={"color": "white", "pad": 0},
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_xlabel(f"{MAIN}; bars: 95% interval of the difference to {evaluation.reference}")
    axes.set_title(f"{evaluation.model}: {evaluation.queries} queries of {evaluation.data}")
    axes.grid(axis="x", alpha=0.3)
    # Beside its place first: an old picture stays until the new one is whole.
    temporary = path.with_name(f".{path.name}.new{path.suffix}")
    try:
        drawing.savefig(temporary, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
