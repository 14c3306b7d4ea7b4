"""Pictures of results, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrank.errors import InputError
from qrank.measure.bench import Row
from qrank.quality.evaluation import Evaluation
from qrank.quality.metrics import MAIN
from qrank.system.disk import cannot_write
from qrank.system.extras import need

SUFFIXES = (".png", ".svg")

_ELSEWHERE = "--plot names another place"


def check_plot(path: Path) -> None:
    """Check that a plot can be written, before anything is measured.

    Raises:
        InputError: its file is neither *.png nor *.svg, or its folder does not exist.
        OSError: the folder is not writable.
        MissingExtraError: matplotlib is not installed.
    """
    import tempfile  # slow to import, and rarely needed

    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a plot's name must end in .png or .svg, found {path.name}")
    if not path.parent.is_dir():
        raise InputError(f"no folder {path.parent} for the plot")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(error, path, _ELSEWHERE) from error
    need("matplotlib")


def plot_bench(rows: Sequence[Row], chosen: Row | None, title: str, path: Path) -> None:
    """Plot the targets that can be used, with the chosen one marked.

    Args:
        rows: of `qrank.measure.bench`.
        chosen: one of them; None marks none.
        title: of the plot.
        path: ends in one of SUFFIXES.
    """
    figure_module, ticker = need("matplotlib.figure"), need("matplotlib.ticker")
    rows = [row for row in rows if row.reason is None]
    figure = figure_module.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    places = _spread([row.kendall for row in rows])
    for row, place in zip(rows, places, strict=True):
        best = row is chosen
        color = "#c2410c" if best else "#1d4ed8"
        axes.scatter(
            row.pairs,
            row.kendall,
            s=140 if best else 45,
            color=color,
            zorder=3,
            marker="*" if best else "o",
        )
        label = f"{row.target.name} {row.setting}".strip() + (" (chosen)" if best else "")
        axes.annotate(
            label,
            (row.pairs, row.kendall),
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=color,
            fontweight="bold" if best else "normal",
            arrowprops={"arrowstyle": "-", "color": "#d4d4d4", "lw": 0.7, "relpos": (0, 0.5)},
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("pairs a second (faster to the right)")
    axes.set_ylabel("Kendall's tau against the original")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=True, which="both", color="#ededed", zorder=0)
    axes.margins(0.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Plot nDCG@10 of each run, with the interval of its difference to the reference."""
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
    _save(drawing, path)


def _save(figure: Any, path: Path) -> None:
    # Write a temporary file first: an old plot stays until the new one is complete.
    temporary = path.with_name(f".{path.name}.new{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(error, path, _ELSEWHERE) from error
    finally:
        temporary.unlink(missing_ok=True)


def _spread(heights: Sequence[float]) -> list[float]:
    """Heights of labels next to the axes, 0 to 1: in the order of their points, evenly spaced."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = [0.0] * len(heights)
    for rank, i in enumerate(order):
        places[i] = (rank + 0.5) / len(order)
    return places
