"""Pictures: ticks cover the data, labels stand beside their points, the chosen one is marked."""

import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrank.cli.labels import clusters, place_labels
from qrank.cli.pictures import CHOSEN, INK, OTHER, linear_ticks, log_ticks, shortened
from qrank.cli.plots import draw_bench, draw_cascades, draw_evaluation, plot_bench
from qrank.measure.bench import Row
from qrank.quality.cascade_evaluation import CascadeEvaluation
from qrank.quality.cascade_evaluation import Row as CascadeRow
from qrank.quality.evaluation import Evaluation
from qrank.quality.evaluation import Row as Run
from qrank.quality.metrics import MEASURES, Difference
from qrank.select.targets import TargetKey

SIZES = st.floats(1e-3, 1e5)


def row(name: str, pairs: float, kendall: float, device: str = "cpu") -> Row:
    return Row(TargetKey(name, device), "", pairs=pairs, kendall=kendall)


def label_boxes(figure: Any) -> dict[str, Any]:
    """Text -> box in points, of the labels that stand on the figure itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    return {text.get_text(): text.get_window_extent() for text in figure.texts[1:]}


@given(SIZES, SIZES, st.integers(3, 9))
def test_linear_ticks_are_round_and_cover_the_data(low: float, size: float, most: int) -> None:
    high = low + size
    ticks = linear_ticks(low, high, most)
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= most
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    digits = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(digits - round_) for round_ in (1, 2, 5)) < 1e-4
    # Less than one step of the axis is empty at either end.
    assert ticks[1] > low - slack
    assert ticks[-2] < high + slack


@given(st.lists(SIZES, min_size=2, max_size=9))
def test_log_ticks_are_round_and_cover_the_data(values: list[float]) -> None:
    ticks = log_ticks(values)
    assert ticks[0] <= min(values)
    assert ticks[-1] >= max(values)
    assert all(f"{tick:e}"[0] in "125" and float(f"{tick:.0e}") == tick for tick in ticks)
    assert all(1.9 < b / a < 10.1 for a, b in pairwise(ticks))
    assert len(ticks) <= 11


@settings(max_examples=25)
@given(st.data(), st.integers(1, 20), st.sampled_from([0.0, 5.0, 40.0, 300.0]))
def test_labels_do_not_overlap(data: st.DataObject, number: int, spread: float) -> None:
    """Anywhere, and the more so where points crowd."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    chance = np.random.default_rng(seed)
    points = chance.uniform(-spread, spread, (number, 2)) + np.array([200.0, 120.0])
    points = np.clip(points, 5, [395, 235])
    groups = clusters(points, 8)
    marks = np.array([[*(points[g].min(0) - 4), *(points[g].max(0) + 4)] for g in groups])
    sizes = np.array([(chance.uniform(30, 150), 12 * len(g)) for g in groups])
    area = (0.0, 0.0, 470.0, 260.0)
    places = place_labels(marks, sizes, area)
    assert places is not None or 12 * number > 200
    boxes = [place.box for place in places or []]
    for i, a in enumerate(boxes):
        np.testing.assert_allclose(np.subtract(a[2:], a[:2]), sizes[i])
        assert min(a[:2]) >= 0
        assert a[2] <= area[2]
        assert a[3] <= area[3]
        for b in [*boxes[:i], *marks]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_clusters_are_points_within_reach(points: list[tuple[int, int]]) -> None:
    at = np.array(points, float).reshape(-1, 2)
    found = clusters(at, 1.0)
    assert sorted(i for group in found for i in group) == list(range(len(at)))
    home = {i: number for number, group in enumerate(found) for i in group}
    for i, j in ((i, j) for i in home for j in home if np.hypot(*(at[i] - at[j])) <= 1):
        assert home[i] == home[j]
    for group in found:  # every member has a neighbour in it
        assert all(
            len(group) == 1 or min(np.hypot(*(at[i] - at[j])) for j in group if j != i) <= 1
            for i in group
        )


ROWS = [
    row("openvino-int8", 168.3, 0.9873),
    row("onnx-fp32", 60.0, 1.0),
    row("openvino-fp32", 61.0, 1.0),  # beside the last: they share a place
    row("onnx-int8", 128.0, 0.9866),
    row("onnx-int4", 71.0, 0.952),
]


def test_bench_marks_the_chosen_target_and_labels_each_beside_its_point() -> None:
    figure = draw_bench([*ROWS, Row(TargetKey("gguf-q8_0", "cpu"), "", "broken")], ROWS[0], "mini")
    (axes,) = figure.axes
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (168.3, 0.9873)
    assert star.get_color() == CHOSEN
    assert sum(line.get_marker() == "o" for line in axes.lines) == 4
    assert {line.get_color() for line in axes.lines} == {CHOSEN, OTHER}
    boxes = label_boxes(figure)
    names = {"onnx-fp32", "openvino-fp32", "onnx-int8", "onnx-int4", "openvino-int8, chosen"}
    assert set(boxes) == names  # all on one device, so it is in the title
    assert figure.texts[0].get_text() == "mini, on cpu"
    for one in ROWS:
        box = boxes[one.target.variant + ", chosen" * (one is ROWS[0])]
        x, y = axes.transData.transform((one.pairs, one.kendall))
        away = math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))
        assert away < 25, one
    assert axes.get_xticks()[0] == 0
    assert axes.get_xticks()[-1] >= 168.3
    assert axes.get_yticks()[0] <= 0.952
    assert axes.get_yticks()[-1] == 1.0


def test_speeds_of_over_a_decade_are_on_a_log_axis_and_devices_are_named() -> None:
    rows = [row("onnx-int8", 40, 0.99), row("onnx-int8", 3100, 0.98, "cuda")]
    figure = draw_bench(rows, None, "mini")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["20", "50", "100", "200", "500", "1,000", "2,000", "5,000"]
    assert set(label_boxes(figure)) == {"onnx-int8@cpu", "onnx-int8@cuda"}
    assert not [line for line in axes.lines if line.get_marker() == "*"]


def test_twenty_equal_targets_are_listed_one_below_the_other() -> None:
    rows = [row(f"target-{i}", 100.0, 1.0) for i in range(20)]
    boxes = list(label_boxes(draw_bench(rows, None, "mini")).values())
    assert len(boxes) == 20
    for i, a in enumerate(boxes):
        assert all(a.y0 >= b.y1 or b.y0 >= a.y1 for b in boxes[:i])


def test_names_are_no_formulas_and_long_ones_lose_their_middle() -> None:
    long = "the-backend-of-some-company/" + "x" * 60
    rows = [row("a$b$c", 10.0, 1.0), row(long, 12.0, 0.9)]
    first, second = label_boxes(draw_bench(rows, None, "a $m_o_d_e$ l"))
    assert second == "a$b$c"
    assert len(first) == 40
    assert first == shortened(long)
    assert first.startswith("the-backend-of-some-")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_ground_is_transparent(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p.{suffix}"
    plot_bench(ROWS, ROWS[0], "mini", path)
    if suffix == "png":
        from matplotlib.image import imread

        image = imread(path)
        assert image.shape[1] == 1300
        assert (image[..., 3] == 0).mean() > 0.9
    else:
        text = path.read_text("utf-8")
        assert INK in text
        assert 'id="chosen"' in text
        assert "fill: #ffffff" not in text


def contrast(color: str, ground: str) -> float:
    """WCAG's contrast ratio."""

    def luminance(code: str) -> float:
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722])) + 0.05

    dark, light = sorted((luminance(color), luminance(ground)))
    return light / dark


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_every_color_shows_on_light_and_dark(ground: str) -> None:
    assert contrast(INK, ground) > 4.2
    assert min(contrast(color, ground) for color in (CHOSEN, OTHER)) > 3  # marks and large text


def test_eval_shows_each_run_with_its_interval_and_the_reference() -> None:
    def run(name: str, value: float, margin: float | None) -> Run:
        difference = None if margin is None else Difference(0.0, margin, 0.5)
        return Run(name, dict.fromkeys(MEASURES, value), difference, None, None)

    rows = [run("BM25", 0.665, 0.031), run("onnx-fp32", 0.688, None), run("onnx-int8", 0.687, 0.01)]
    evaluation = Evaluation("m", "data", 9, 100, 1.0, "onnx-fp32", "", None, rows, {})
    (axes,) = draw_evaluation(evaluation).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["onnx-int8", "onnx-fp32", "BM25"]  # upwards
    ticks = axes.get_xticks()
    assert ticks[0] <= 0.665 - 0.031
    assert ticks[-1] >= 0.665 + 0.031
    (reference,) = [line for line in axes.lines if line.get_marker() == "D"]
    assert reference.get_xdata()[0] == 0.688
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(bar, [0.634, 0.696]) for bar in bars)
    assert [text.get_text() for text in axes.texts] == ["0.687", "0.688", "0.665"]


def test_a_frontier_has_its_line_and_labels_beside_it() -> None:
    even = Difference(0.0, 0.01, 0.5)
    found: list[tuple[str, float, float | None]] = [
        ("BM25", 0.342, None),
        ("small", 0.352, 520.0),
        ("large", 0.412, 1400.0),
    ]
    found += [("keep 5", 0.380, 590.0), ("keep 20", 0.409, 800.0), ("keep 50", 0.413, 1220.0)]
    rows = [
        CascadeRow(
            name, None, dict.fromkeys(MEASURES, value), None if name == "large" else even, ms
        )
        for name, value, ms in found
    ]
    shown = (["small", "large"], ["a", "b"], "data", 9, 100, [5.2, 14.0], rows)
    figure = draw_cascades(CascadeEvaluation(*shown, 10, 50, 4, 5, [], None))
    boxes = label_boxes(figure)
    assert set(boxes) == {name for name, *_ in found}
    (axes,) = figure.axes
    (line,) = [each for each in axes.lines if len(each.get_xdata()) == 4]
    best = [(520.0, 0.352), (590.0, 0.380), (800.0, 0.409), (1220.0, 0.413)]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == best
    for (name, box), (a, b) in product(boxes.items(), pairwise(axes.transData.transform(best))):
        for x, y in np.linspace(a, b, 50):
            assert not box.contains(x, y), name
    (diamond,) = [each for each in axes.lines if each.get_marker() == "D"]
    assert diamond.get_xdata()[0] == 1400
