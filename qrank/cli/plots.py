"""Pictures of results, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qrank.cli.labels import clusters, place_labels
from qrank.cli.pictures import (
    CHOSEN,
    INK,
    LINE,
    MARGIN,
    OTHER,
    RADIUS,
    SMALL,
    linear_ticks,
    log_ticks,
    mark,
    new_figure,
    set_ticks,
    shortened,
    text_width,
    write,
)
from qrank.errors import InputError
from qrank.measure.bench import Row
from qrank.quality.cascade_evaluation import CascadeEvaluation
from qrank.quality.evaluation import Evaluation
from qrank.quality.metrics import MAIN
from qrank.system.disk import cannot_write
from qrank.system.extras import need

SUFFIXES = (".png", ".svg")

_ELSEWHERE = "--plot names another place"

LEAST = 0.02
"""The least that an axis of fidelity or quality spans: less is noise."""


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
    """Plot speed and fidelity of the targets that can be used, with the chosen one marked.

    Args:
        rows: of `qrank.measure.bench`.
        chosen: one of them; None marks none.
        title: of the plot.
        path: ends in one of SUFFIXES.
    """
    _save(draw_bench(rows, chosen, title), path)


def draw_bench(rows: Sequence[Row], chosen: Row | None, title: str) -> Any:
    """The matplotlib figure of `plot_bench`."""
    rows = sorted((row for row in rows if row.reason is None), key=lambda row: -row.pairs)
    devices = sorted({row.target.device for row in rows})
    if len(devices) == 1:
        title += f", on {devices[0]}"
    names = [_name(row, len(devices) > 1) + ", chosen" * (row is chosen) for row in rows]
    for height in count(3.4, 0.6):
        figure, axes = new_figure(height, title, right=80.0)
        _speed_axis(axes, [row.pairs for row in rows])
        _fidelity_axis(axes, [row.kendall for row in rows])
        for row in rows:
            mark(axes, row.pairs, row.kendall, "*" if row is chosen else "o")
        points = [(row.pairs, row.kendall) for row in rows]
        marked = None if chosen is None or chosen not in rows else rows.index(chosen)
        if _label(figure, axes, points, names, marked):
            return figure
    raise AssertionError("unreachable")


def _name(row: Row, with_device: bool) -> str:
    """A row's label."""
    target = row.target.name if with_device else row.target.name.rpartition("@")[0]
    return shortened(f"{target} {row.setting}".strip())


def _speed_axis(axes: Any, speeds: Sequence[float]) -> None:
    """From zero; logarithmic, if the fastest is more than ten times as fast as the slowest."""
    log = speeds and max(speeds) > 10 * min(speeds) > 0
    ticks = log_ticks(speeds) if log else linear_ticks(0.0, max([*speeds, 1e-9]))
    if log:
        axes.set_xscale("log")
    set_ticks(axes.xaxis, ticks)
    axes.set_xlabel("pairs a second: right is faster")


def _fidelity_axis(axes: Any, taus: Sequence[float]) -> None:
    """From 1 down to the lowest, and at least to 1 - LEAST: smaller differences are noise."""
    ticks = linear_ticks(min([*taus, 1.0 - LEAST]), 1.0)
    set_ticks(axes.yaxis, [tick for tick in ticks if tick <= 1.0])
    axes.set_ylabel("Kendall's tau against the original: up is closer")


def _label(
    figure: Any,
    axes: Any,
    data: Sequence[tuple[float, float]],
    names: Sequence[str],
    chosen: int | None,
    curve: Sequence[tuple[float, float]] = (),
) -> bool:
    """Write each label beside its point, not on a curve; False if there is no room for all.

    Points that touch share a place, where their labels are listed in their order.
    """
    if not data:
        return True
    points = axes.transData.transform(data)
    texts = [
        write(figure, name, CHOSEN if i == chosen else INK, bold=i == chosen)
        for i, name in enumerate(names)
    ]
    groups = clusters(points, 2 * RADIUS)
    marks, sizes = np.empty((len(groups), 4)), np.empty((len(groups), 2))
    for i, group in enumerate(groups):
        marks[i, :2] = points[group].min(axis=0) - RADIUS
        marks[i, 2:] = points[group].max(axis=0) + RADIUS
        widths = [text_width(names[j], bold=j == chosen) for j in group]
        sizes[i] = max(widths), LINE * len(group)
    whole = figure.bbox.size
    area = axes.get_window_extent()
    room = (area.x0, area.y0 - RADIUS, whole[0] - MARGIN, area.y1 + 0.6 * LINE)
    steps = axes.transData.transform(curve) if curve else ()
    taken = [np.linspace(a, b, 60) for a, b in pairwise(steps)]
    boxes = np.hstack([np.vstack(taken) - 1, np.vstack(taken) + 1]) if taken else None
    places = place_labels(marks, sizes, room, boxes)
    if places is None:
        return False
    for place, group, (x, _) in zip(places, groups, (marks[:, :2] + marks[:, 2:]) / 2, strict=True):
        left, _, right, top = place.box
        # Lines of a list are flush with the side that the point is on.
        side = "left" if x < left + 1 else "right" if x > right - 1 else "center"
        at = {"left": left, "right": right, "center": (left + right) / 2}[side]
        for line, j in enumerate(group):
            texts[j].set(x=at / whole[0], y=(top - LINE * (line + 0.5)) / whole[1], ha=side)
        if place.line is not None:
            ends = np.reshape(place.line, (2, 2)) / whole
            figure.add_artist(need("matplotlib.lines").Line2D(*ends.T, color=INK, linewidth=0.6))
    return True


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Plot nDCG@10 of each run, with the interval of its difference to the reference."""
    _save(draw_evaluation(evaluation), path)


def draw_evaluation(evaluation: Evaluation) -> Any:
    """The matplotlib figure of `plot_evaluation`."""
    rows = evaluation.rows[::-1]
    names = [shortened(row.name) for row in rows]
    margins = [(row.difference and row.difference.margin) or 0.0 for row in rows]
    values = [row.measures[MAIN] for row in rows]
    low = min(value - margin for value, margin in zip(values, margins, strict=True))
    high = max(value + margin for value, margin in zip(values, margins, strict=True))
    widen = max(0.0, LEAST - (high - low)) / 2
    title = f"{evaluation.model}: {evaluation.queries:,} queries of {evaluation.data}"
    figure, axes = new_figure(0.3 * (len(rows) + 1), title, beside=names)
    most = int(axes.get_window_extent().width / 50)
    set_ticks(axes.xaxis, linear_ticks(max(0.0, low - widen), min(1.0, high + widen), most))
    for place, (row, value, margin) in enumerate(zip(rows, values, margins, strict=True)):
        reference = row.name == evaluation.reference
        color = CHOSEN if reference else OTHER
        if reference:
            axes.axvline(value, color=color, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        axes.plot([value - margin, value + margin], [place, place], color=color, linewidth=2.5)
        mark(axes, value, place, "D" if reference else "o")
        axes.annotate(
            f"{value:.3f}",
            (1, place),
            (2.5 * RADIUS, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            color=color if reference else INK,
            fontsize=SMALL,
            va="center_baseline",
        )
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")
    reference_name = shortened(evaluation.reference)
    axes.set_xlabel(
        f"{MAIN}; bars: 95% interval of the difference to {reference_name}", parse_math=False
    )
    return figure


def plot_cascades(evaluation: CascadeEvaluation, path: Path) -> None:
    """Plot nDCG@10 and the time per query of both models and of their cascades."""
    _save(draw_cascades(evaluation), path)


def draw_cascades(evaluation: CascadeEvaluation) -> Any:
    """The matplotlib figure of `plot_cascades`."""
    first, *rows = evaluation.rows
    rows.sort(key=lambda row: row.milliseconds or 0.0)
    points = [(row.milliseconds or 0.0, row.measures[MAIN]) for row in rows]
    names = [shortened(row.name) for row in rows]
    values = [first.measures[MAIN], *(value for _, value in points)]
    widen = max(0.0, LEAST - (max(values) - min(values))) / 2
    title = (
        f"{' and '.join(evaluation.models)}: {evaluation.queries:,} queries of {evaluation.data}, "
        f"{evaluation.depth} candidates"
    )
    large = next(i for i, row in enumerate(rows) if row.difference is None)
    for height in count(3.0, 0.6):
        figure, axes = new_figure(height, title, right=80.0)
        set_ticks(axes.xaxis, linear_ticks(0.0, max(time for time, _ in points)))
        set_ticks(
            axes.yaxis,
            linear_ticks(max(0.0, min(values) - widen), min(1.0, max(values) + widen)),
        )
        axes.set_xlabel("milliseconds a query: left is faster")
        axes.set_ylabel(f"{MAIN}: up is better")
        axes.axhline(first.measures[MAIN], color=INK, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        best = _frontier(points)
        axes.plot(*zip(*best, strict=True), color=OTHER, linewidth=1, zorder=2)
        for i, point in enumerate(points):
            mark(axes, *point, "D" if i == large else "o")
        # The first stage has a height, but no time: its label stands at the end of its line.
        labelled = [*points, (axes.get_xlim()[1], first.measures[MAIN])]
        if _label(figure, axes, labelled, [*names, first.name], large, best):
            return figure
    raise AssertionError("unreachable")


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no faster one equals, the fastest first."""
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: (each[0], -each[1])):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found


def _save(figure: Any, path: Path) -> None:
    # Write a temporary file first: an old plot stays until the new one is complete.
    temporary = path.with_name(f".{path.name}.new{path.suffix}")
    try:
        figure.savefig(temporary, dpi=200, transparent=True)
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(error, path, _ELSEWHERE) from error
    finally:
        temporary.unlink(missing_ok=True)
