"""A format of another package (`toy`) works everywhere, without any code for it in qrank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qrank.bundle.manifest import Manifest
from qrank.cli import main

PASSAGES = "mars is the red planet\nbread is baked\nred wine\n"


@pytest.fixture(autouse=True)
def _toy(own_cache: Path, plug_in: Callable[..., None]) -> None:
    """Install the backend, with a separate cache per test."""
    plug_in(toy="toy:SPEC")


def qrank_(*arguments: str | Path, stdin: str = "") -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path where the first test that converts writes the bundle."""
    return tmp_path_factory.mktemp("toy") / "bundle"


@pytest.fixture
def toys(bert: str, converted: Path) -> Path:
    """Tiny BERT's bundle in both precisions, made by the command."""
    if not converted.exists():
        both = ("--precision", "fp32", "--precision", "fp16")
        qrank_("convert", bert, "--to", "toy", *both, "-o", converted)
    return converted


def test_convert_makes_and_proves_it(toys: Path) -> None:
    variants = Manifest.load(toys).variants
    assert list(variants) == ["toy-fp32", "toy-fp16"]
    assert variants["toy-fp32"].fidelity.max_abs < variants["toy-fp16"].fidelity.max_abs
    assert variants["toy-fp32"].fidelity.kendall == 1


def test_help_of_convert_names_it() -> None:
    text = " ".join(qrank_("convert", "--help").output.split())
    assert "[onnx|openvino|gguf|mlx|toy]" in text
    assert "toy: fp32, fp16" in text


def test_doctor_computes_with_it() -> None:
    backends = {
        each["name"]: each for each in json.loads(qrank_("doctor", "--json").stdout)["backends"]
    }
    assert backends["toy"]["version"].startswith("numpy ")
    (device,) = backends["toy"]["devices"]
    assert (device["name"], device["computes"], device["detail"]) == ("cpu", True, "slowly")


def test_tune_bench_and_score_run_it(toys: Path, tmp_path: Path) -> None:
    names = {"toy-fp32@cpu", "toy-fp16@cpu"}
    found = json.loads(qrank_("tune", toys, "--json").stdout)
    assert {each["target"] for each in found if each["reason"] is None} == names
    documents = tmp_path / "passages.jsonl"
    records = [{"id": str(i), "text": text} for i, text in enumerate(PASSAGES.splitlines())]
    documents.write_text("\n".join(map(json.dumps, records)), "utf-8")
    shown = qrank_("bench", toys, "--documents", documents, "--seconds", "0", "--json")
    assert {row["target"] for row in json.loads(shown.stdout)["targets"]} == names
    for backend in ("toy", "toy-fp16", "toy/toy-fp16"):
        command = ("score", "-m", toys, "-q", "which planet is red?", "-f", "json")
        ranked = json.loads(qrank_(*command, "--backend", backend, stdin=PASSAGES).stdout)
        assert ranked["target"] in names
        assert len(ranked["results"]) == 3


def test_it_scores_unmeasured_and_beside_other_formats(
    toys: Path, onnx_only: Path, tmp_path: Path
) -> None:
    command = ("score", "-q", "which planet is red?", "-f", "json")
    alone = json.loads(qrank_(*command, "-m", toys, stdin=PASSAGES).stdout)
    assert alone["target"] == "toy-fp32@cpu"
    both = Path(shutil.copytree(onnx_only, tmp_path / "both"))
    shutil.copytree(toys / "toy-fp32", both / "toy-fp32")
    toy = Manifest.load(toys).variants["toy-fp32"]
    Manifest.load(both).with_variant(toy).save(both)
    first = json.loads(qrank_(*command, "-m", both, stdin=PASSAGES).stdout)
    assert first["target"] == "onnx-int8@cpu"
    named = json.loads(qrank_(*command, "-m", both, "--backend", "toy", stdin=PASSAGES).stdout)
    assert named["target"] == "toy-fp32@cpu"
