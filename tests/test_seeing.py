"""`qrank doctor` and `qrank bench`: what they show, and that no failing backend ends them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import subset

from qrank.backends import BACKENDS, spec
from qrank.cli import main
from qrank.system import extras

PlugIn = Callable[..., None]


def qrank_(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_multiplies_matrices(backend: str) -> None:
    """doctor's check that a device computes; with these shapes, a transposed product would fail."""
    numbers = np.random.default_rng(1)
    a = numbers.standard_normal((3, 64), np.float32)
    b = numbers.standard_normal((64, 5), np.float32)
    product = spec(backend).product
    assert product is not None
    found = product(a, b, "cpu")
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found, a @ b, atol=1e-4)


def test_doctor_tells_what_is_there_and_what_fails(
    plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(
        looked="doubles:CRASHES_WHEN_LOOKED_FOR",
        miscounts="doubles:MISCOUNTS",
        right="doubles:RIGHT",
    )
    there = extras.installed
    monkeypatch.setattr(
        "qrank.backends.contract.installed", lambda m: m != "llama_cpp" and there(m)
    )
    result = qrank_("doctor", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["machine"]["processors"] >= content["machine"]["cores"] >= 1
    found = {backend["name"]: backend for backend in content["backends"]}
    assert set(found) == {*BACKENDS, "looked", "miscounts", "right"}
    assert found["gguf"]["version"] is None
    assert found["gguf"]["advice"] == 'pip install "qrank[gguf]"'
    assert "died" in found["looked"]["reason"]
    devices = {
        name: {device["name"]: device for device in backend["devices"]}
        for name, backend in found.items()
    }
    assert devices["onnx"]["cpu"]["computes"] is True
    assert devices["openvino"]["cpu"]["computes"] is True
    assert devices["right"]["cpu"]["computes"] is None
    assert devices["miscounts"]["cpu"]["computes"] is False
    assert "off by" in devices["miscounts"]["cpu"]["detail"]
    assert {kind for kind, device in devices["onnx"].items() if not device["present"]} >= {"coreml"}


def test_doctor_is_one_screen() -> None:
    result = qrank_("doctor")
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    for backend in BACKENDS:
        assert any(line.startswith(f"{backend} ") for line in lines)


def test_bench_shows_all_targets_and_marks_the_chosen_one(
    bundle: Path, tmp_path: Path, plug_in: PlugIn
) -> None:
    plug_in(wrong="doubles:WRONG", tires="doubles:TIRES")
    folder = subset(bundle, tmp_path / "two", ["onnx-int8", "onnx-fp32"])
    (tmp_path / "d.jsonl").write_text(
        '{"id": 1, "text": "mars is red"}\n{"id": 2, "text": "bread"}\n', "utf-8"
    )
    picture = tmp_path / "speed.svg"
    command = ("bench", folder, "--documents", tmp_path / "d.jsonl", "--seconds", "0")
    result = qrank_(*command, "--json", "--plot", picture)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["targets"]
    usable = {row["target"]: row for row in rows if row["reason"] is None}
    assert set(usable) == {"onnx-int8@cpu", "onnx-fp32@cpu"}
    for row in usable.values():
        assert set(row["p50"]) == set(row["p95"]) == {"1", "20", "100"}
        assert all(0 < row["p50"][count] <= row["p95"][count] for count in row["p50"])
        assert row["tokens"] > row["pairs"] > 0
        assert row["rounds"] == {"1": 5, "20": 5, "100": 5}
    assert sum(row["chosen"] for row in rows) == 1
    failed = {row["target"]: row["reason"] for row in rows if row["reason"] is not None}
    assert set(failed) == {
        f"{name}/{v}@cpu" for name in ("wrong", "tires") for v in ("onnx-int8", "onnx-fp32")
    }
    assert "computes wrongly" in failed["wrong/onnx-int8@cpu"]
    assert "MemoryError" in failed["tires/onnx-int8@cpu"]
    assert picture.read_text("utf-8").count("<svg") == 1
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["speed.svg"]
    table = qrank_(*command, "--backend", "onnx-int8", "--device", "cpu").stdout
    assert "onnx-int8@cpu*" in table
    assert "fp32" not in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("name", ["speed.pdf", "speed", "speed.png.txt"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    result = qrank_("bench", bundle, "--plot", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "must end in .png or .svg" in result.stderr


def test_bench_of_nothing_is_told(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    assert qrank_("bench", bundle, "--documents", tmp_path / "empty.jsonl").exit_code == 2
