"""Where labels of a scatter plot stand: beside their points, on nothing else. Units: points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

MARGIN = 2.0
"""Distance between two labels."""

GAP = 4.0
"""Distance between a mark and the label beside it."""

_BESIDE = (
    *((1, 0, 0.0), (-1, 0, 1.0), (0, 1, 2.0), (0, -1, 2.0)),
    *((1, 1, 2.5), (1, -1, 2.5), (-1, 1, 2.5), (-1, -1, 2.5)),
)
"""Sides of a mark: right, up, and how much worse than the right side it is."""

_AWAY = (8.0, 14.0, 20.0, 28.0, 36.0, 46.0, 58.0, 72.0, 90.0, 120.0, 160.0, 220.0)
"""Distances of labels that find no place beside their mark."""


@dataclass(frozen=True)
class Place:
    """Where a label stands.

    Attributes:
        box: where it stands.
        line: x and y of the leader's two ends, from the label to the mark; None: the label is
            beside its mark.
    """

    box: Box
    line: Box | None


def clusters(points: Floats, reach: float) -> list[list[int]]:
    """Group points [n, 2]: steps of at most `reach` lead from each to every other of its group."""
    left, found = list(range(len(points))), []
    while left:
        group = [left.pop(0)]
        for i in group:
            near = [j for j in left if np.hypot(*(points[i] - points[j])) <= reach]
            left = [j for j in left if j not in near]
            group += near
        found.append(group)
    return found


def place_labels(
    marks: Floats, sizes: Floats, area: Box, taken: Floats | None = None
) -> list[Place] | None:
    """Place each label as close to its mark as the others allow.

    No label overlaps another one or a mark, or leaves the area, and no leader crosses a label or
    another leader, unless there are so many that leaders must. Labels are placed one after the
    other, in several orders, and the shortest leaders win.

    Args:
        marks: [n, 4] boxes within the area.
        sizes: [n, 2] widths and heights of the labels.
        area: where labels may be.
        taken: [m, 4] boxes that labels leave free. None: there are none.

    Returns:
        [n] places; None if there is no room for all.
    """
    at = (marks[:, :2] + marks[:, 2:]) / 2
    near = np.abs(at[:, None] - at[None]) < sizes[:, None] + sizes[None]
    crowd = near.all(axis=2).sum(axis=1)
    x, y = at.T
    orders = [np.argsort(key, kind="stable") for key in (-crowd, x, -x, y, -y)]
    choices = [_choices(i, marks, sizes[i], area) for i in range(len(at))]
    for crossing in (False, True):
        tried = [_in_order(order, marks, choices, taken, crossing) for order in orders]
        found = [one for one in tried if one is not None]
        if found:
            return min(found, key=lambda one: one[0])[1]
    return None


def _choices(i: int, marks: Floats, size: Floats, area: Box) -> tuple[Floats, Floats]:
    """Boxes [m, 4] within the area for label i, and their costs [m], the best first."""
    middle, half = (marks[i, :2] + marks[i, 2:]) / 2, (marks[i, 2:] - marks[i, :2]) / 2
    (width, height), boxes, costs = size, [], []

    def add(at: Floats, side: tuple[float, float], cost: float) -> None:
        """Add the box that touches a point and lies on that side of it."""
        corner = at - size * (1 - np.array(side)) / 2
        boxes.append((*corner, *(corner + size)))
        costs.append(cost)

    for x, y, worse in _BESIDE:
        reach = half + GAP if not (x and y) else half * 0.7 + GAP / 2
        add(middle + reach * (x, y), (x, y), worse)
    for away in _AWAY:
        for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
            step = np.array([np.cos(angle), np.sin(angle)])
            side_x, side_y = (float(np.sign(v)) if abs(v) > 0.3 else 0.0 for v in step)
            add(middle + (half + GAP + away) * step, (side_x, side_y), 4.0 + away)
    for left in np.arange(area[0], area[2] - width, width / 2):
        for bottom in np.arange(area[1], area[3] - height, height + MARGIN):
            corner = np.array([left, bottom])
            add(corner, (1.0, 1.0), _AWAY[-1] + float(np.hypot(*(corner - middle))))
    found, cost = np.array(boxes), np.array(costs)
    inside = (found[:, :2] >= area[:2]).all(axis=1) & (found[:, 2:] <= area[2:]).all(axis=1)
    found, cost = found[inside], cost[inside]
    # A label closer to another mark than to its own would be read as that one's.
    apart = _distances(found, marks)
    cost = cost + 8.0 * (np.delete(apart, i, axis=1) <= apart[:, [i]]).sum(axis=1)
    order = np.argsort(cost, kind="stable")
    return found[order], cost[order]


def _in_order(
    order: NDArray[np.int64],
    marks: Floats,
    choices: Sequence[tuple[Floats, Floats]],
    taken: Floats | None,
    crossing: bool,
) -> tuple[float, list[Place]] | None:
    """Place labels one after the other; their total cost and places, if all have one."""
    places: dict[int, Place] = {}
    standing, lines = np.empty((0, 4)), np.empty((0, 4))
    beside = marks if taken is None else np.vstack([marks, taken])
    around = np.array([-MARGIN, -MARGIN / 2, MARGIN, MARGIN / 2])
    total = 0.0
    for i in order:
        boxes, costs = choices[i]
        free = ~_overlap(boxes, np.vstack([beside, standing])).any(axis=1)
        if not crossing:
            free &= ~_crossed(boxes, lines).any(axis=1)
        others = np.vstack([np.delete(marks, i, axis=0), standing])
        for j in np.flatnonzero(free):
            line = _leader(boxes[j], marks[i])
            drawn = np.empty((0, 4)) if line is None else np.array([line])
            if line is not None and not crossing:
                stopped = _crossed(others, drawn).any() or _cross(lines, drawn[0]).any()
                if stopped:
                    continue
            left, bottom, right, top = (float(v) for v in boxes[j])
            places[int(i)] = Place((left, bottom, right, top), line)
            standing = np.vstack([standing, boxes[j] + around])
            lines = np.vstack([lines, drawn])
            total += float(costs[j]) ** 1.5
            break
        else:
            return None
    return total, [places[i] for i in range(len(marks))]


def _leader(box: Floats, mark: Floats) -> Box | None:
    """The line from a label to its mark; None if the label is beside it."""
    middle = (mark[:2] + mark[2:]) / 2
    end = np.clip(middle, box[:2], box[2:])
    begin = np.clip(end, mark[:2], mark[2:])
    if np.hypot(*(end - begin)) < 2 * GAP:
        return None
    begin = middle + (begin - middle) * 0.8
    return float(end[0]), float(end[1]), float(begin[0]), float(begin[1])


def _distances(boxes: Floats, others: Floats) -> Floats:
    """Distances [m, k] of boxes [m, 4] from others [k, 4]."""
    a, b = boxes[:, None], others[None]
    apart = np.maximum(a[..., :2] - b[..., 2:], b[..., :2] - a[..., 2:]).clip(0)
    found: Floats = np.hypot(apart[..., 0], apart[..., 1])
    return found


def _overlap(boxes: Floats, others: Floats) -> NDArray[np.bool_]:
    """Whether boxes [m, 4] and others [k, 4] overlap: [m, k]."""
    a, b = boxes[:, None], others[None]
    found: NDArray[np.bool_] = np.all(
        (a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:]), axis=-1
    )
    return found


def _crossed(boxes: Floats, lines: Floats) -> NDArray[np.bool_]:
    """Whether lines [k, 4] touch boxes [m, 4]: [m, k], by clipping each line to each box."""
    begin, step = lines[None, :, :2], (lines[:, 2:] - lines[:, :2])[None]
    step = np.where(step == 0, 1e-9, step)
    one, two = (boxes[:, None, :2] - begin) / step, (boxes[:, None, 2:] - begin) / step
    enter = np.minimum(one, two).max(-1, initial=0.0)
    leave = np.maximum(one, two).min(-1, initial=1.0)
    found: NDArray[np.bool_] = enter < leave
    return found


def _cross(lines: Floats, line: Floats) -> NDArray[np.bool_]:
    """Whether lines [k, 4] cross a line: [k]."""

    def side(a: Floats, b: Floats, c: Floats) -> Floats:
        """Sign of the turn a -> b -> c."""
        turn: Floats = np.sign(
            (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1])
            - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])
        )
        return turn

    a, b, c, d = lines[:, :2], lines[:, 2:], line[:2], line[2:]
    found: NDArray[np.bool_] = (side(a, b, c) != side(a, b, d)) & (side(c, d, a) != side(c, d, b))
    return found
