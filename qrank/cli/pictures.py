"""How pictures look: colors, ticks and sizes that suit light and dark pages, 600 pixels wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from qrank.system.extras import need

INK = "#7a7a7a"
"""Text and lines: contrast 4.3 to 1 with white and with GitHub's dark page."""

CHOSEN, OTHER = "#d55e00", "#0072b2"
"""Okabe and Ito's vermilion and blue, which people with any color vision tell apart."""

SMALL, LARGE = 9.0, 10.0
"""Font sizes in points."""

WIDTH = 6.5
"""Of every picture, in inches: at 600 pixels, SMALL is 11.5 pixels high."""

MARGIN = 6.0
"""Between the picture's edges and its content, in points."""

LINE = 12.0
"""Height of a line of small text, in points."""

RADIUS = 4.0
"""Of a mark, in points."""

LONGEST = 40
"""Letters of a name; the middle of a longer one is left out."""

_POINTS = 72.0  # an inch


def linear_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers at equal steps, from `low` or below to `high` or above."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    exponent = math.floor(math.log10((high - low) / most))
    for size in (1, 2, 5, 10, 20, 50):
        step = size * 10.0**exponent
        # A bound that is a multiple but for its last bit is one.
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            break
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from the smallest value or below to the largest or above.

    Above three decades, powers of ten alone.
    """
    low, high = min(values), max(values)
    sizes = (1, 2, 5) if high <= 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [float(f"{size}e{power}") for power in powers for size in sizes]
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    return ticks[first : last + 1]


def shortened(name: str, most: int = LONGEST) -> str:
    """A name without its middle, if it is long."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"


def new_figure(
    height: float, title: str, beside: Sequence[str] = ("0.0000",), right: float = 46.0
) -> tuple[Any, Any]:
    """A figure and its axes. The figure has 72 dots an inch: sizes on it are points.

    Args:
        height: of the axes, in inches.
        title: of the figure. It is wrapped.
        beside: labels of the axis to the left.
        right: space beside the axes, in points.
    """
    lines = textwrap.wrap(title, 80)
    left = MARGIN + 1.6 * LINE + max(map(text_width, beside))
    bottom, above = MARGIN + 2.7 * LINE, MARGIN + (len(lines) * 1.2 + 1) * LINE
    width, whole = WIDTH * _POINTS, bottom + height * _POINTS + above
    figure: Any = need("matplotlib.figure").Figure(figsize=(WIDTH, whole / _POINTS), dpi=_POINTS)
    axes = figure.add_axes(
        (left / width, bottom / whole, 1 - (left + right) / width, height * _POINTS / whole)
    )
    heading = write(figure, "\n".join(lines))
    heading.set(x=MARGIN / width, y=1 - MARGIN / whole, va="top", fontsize=LARGE)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, color=INK, alpha=0.3, linewidth=0.6)
    axes.tick_params(which="both", colors=INK, labelsize=SMALL, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=SMALL)
    axes.xaxis.set_label_coords(0.5, MARGIN / whole, transform=figure.transFigure)
    axes.xaxis.label.set_verticalalignment("bottom")
    axes.spines[:].set_visible(False)
    return figure, axes


def write(figure: Any, text: str, color: str = INK, *, bold: bool = False) -> Any:
    """A text on a figure, whose place is set later."""
    weight = "bold" if bold else "normal"
    style: Any = {"color": color, "fontsize": SMALL, "fontweight": weight, "parse_math": False}
    return figure.text(0, 0, text, va="center_baseline", **style)


def text_width(text: str, *, bold: bool = False) -> float:
    """Width of a small text in points, as in an SVG; in a PNG it differs by a hair."""
    font = need("matplotlib.font_manager").FontProperties(weight="bold" if bold else "normal")
    plain = text.replace("$", r"\$")  # or it would begin a formula
    path = need("matplotlib.textpath").TextPath((0, 0), plain, size=SMALL, prop=font)
    return float(path.get_extents().x1)


def set_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Label the ticks, all with the same decimals; the axis ends at the first and the last."""
    decimals = max(
        len(np.format_float_positional(tick, trim="-").partition(".")[2]) for tick in ticks
    )
    log = axis.get_scale() == "log"
    labels = [f"{tick:,g}" if log else f"{tick:,.{decimals}f}" for tick in ticks]
    axis.set_ticks([], minor=True)
    axis.set_ticks(ticks, labels)
    getattr(axis.axes, f"set_{axis.axis_name}lim")(ticks[0], ticks[-1])


def mark(axes: Any, x: float, y: float, shape: str = "o") -> None:
    """Draw a point; shapes other than "o" stand out. It is whole, even at the end of an axis."""
    axes.plot(
        *(x, y),
        marker=shape,
        markersize={"*": 3.2, "D": 1.5}.get(shape, 1.6) * RADIUS,
        color=OTHER if shape == "o" else CHOSEN,
        markeredgewidth=0,
        clip_on=False,
        zorder=3 if shape == "o" else 4,
        gid=None if shape == "o" else "chosen",
    )
