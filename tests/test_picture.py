"""The README's picture shows the stored results, and only what ranks about as well."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def content(**speeds: tuple[float, float]) -> dict[str, Any]:
    """A results file with (pairs/s, nDCG@10) by system."""
    rows = [
        {"system": name.replace("_", " "), "pairs/s": speed, "nDCG@10": ndcg}
        for name, (speed, ndcg) in speeds.items()
    ]
    table = {"title": "mini: 40 pairs of a collection", "rows": rows}
    return {"cpu": "A CPU", "instruction sets": [], "threads": 2, "tables": [table]}


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield pytest.importorskip("picture")
    del sys.modules["picture"]


def test_the_chosen_target_and_its_equals_are_drawn_by_speed(picture: Any) -> None:
    speeds = {
        picture.ORIGINAL: (5.0, 0.40),
        "a peer": (10.0, 0.39),
        "one that ranks wrongly": (90.0, 0.2),
        f"{picture.CHOSEN}onnx-int8@cpu": (20.0, 0.39),
        "qrank gguf-q8_0": (7.0, 0.4),
    }
    figure = picture.draw(content(**speeds))
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [picture.ORIGINAL, "a peer", "qrank (onnx-int8)"]
    assert [bar.get_width() for bar in axes.patches] == [5.0, 10.0, 20.0]
    assert [text.get_text().strip() for text in axes.texts] == [
        "5.0",
        "10.0  (2.0 x)",
        "20.0  (4.0 x)",
    ]
    assert axes.get_xlim()[0] == 0
    assert "mini" in figure.get_suptitle()
    assert "2 threads of A CPU" in figure.get_suptitle()
