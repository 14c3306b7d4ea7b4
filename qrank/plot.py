"""Speed against fidelity, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qrank.bench import Row
from qrank.errors import InputError
from qrank.extras import need

SUFFIXES = (".png", ".svg")


def check(path: Path) -> None:
    """Refuse, before anything is measured, what could not be written afterwards.

    Raises:
        InputError: the name does not end in one of SUFFIXES.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} must end in {' or '.join(SUFFIXES)}")
    need("matplotlib")


def plot(rows: Sequence[Row], chosen: Row | None, title: str, path: Path) -> None:
    """Write a picture of targets that can be used, the chosen one marked.

    Args:
        rows: of `qrank.bench`.
        chosen: one of them.
        title: what stands above.
        path: ends in one of SUFFIXES.
    """
    check(path)
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
        label = f"{row.target} {row.setting}".strip() + (" (chosen)" if best else "")
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
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _spread(heights: Sequence[float]) -> list[float]:
    """Places of labels beside the axes, 0 to 1: in the order of their points, and apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = [0.0] * len(heights)
    for rank, i in enumerate(order):
        places[i] = (rank + 0.5) / len(order)
    return places
