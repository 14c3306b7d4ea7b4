"""Conversion that fails: what is refused, and what a run that is cut short leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import contents
from onnx import numpy_helper
from transformers import AutoModelForSequenceClassification

from qrank import Reranker
from qrank.converters import graph_file
from qrank.converters import onnx as onnx_converter
from qrank.converters.checkpoint import Checkpoint
from qrank.converters.convert import convert
from qrank.errors import BundleError, ConversionError, FidelityError, QrankError
from qrank.fidelity import TOLERANCES, Tolerance
from qrank.work import Work

FP32 = [("onnx", "fp32")]
PAIRS = [("which planet is red?", "Mars is."), ("bread?", "Yeast ferments sugar in the dough.")]


# Proof


@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("add", [False, True])
def test_a_variant_below_its_tolerance_is_refused(
    add: bool, without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = without_fp32 if add else without_fp32.with_name("new-qrank")
    before = contents(without_fp32.parent)
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(0.0, 1.0))
    with pytest.raises(FidelityError, match=r"onnx-fp32 .* max \|Δlogit\| is .* at most 0 allowed"):
        convert(bert, FP32, target)
    assert contents(without_fp32.parent) == before
    assert [path.name for path in target.parent.iterdir()] == [without_fp32.name]


def wrong_head(graph: onnx.GraphProto) -> None:
    """The first token's pooler left out, as llama.cpp's converter does it."""
    (weight,) = (i for i in graph.initializer if i.name.endswith("pooler.dense.weight"))
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.eye(len(array), dtype=np.float32), weight.name))


def nan_head(graph: onnx.GraphProto) -> None:
    (weight,) = (i for i in graph.initializer if i.name.endswith("classifier.bias"))
    array = np.full_like(numpy_helper.to_array(weight), np.nan)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


@pytest.mark.parametrize("damage", [wrong_head, nan_head])
def test_a_graph_that_computes_wrongly_is_refused(
    damage: Callable[[onnx.GraphProto], None],
    bundle: Path,
    without_fp32: Path,
    bert: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_wrong(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Work) -> str:
        graph = onnx.load(bundle / "onnx-fp32" / "model.onnx")
        damage(graph.graph)
        onnx.save(graph, folder / "model.onnx")
        return ""

    monkeypatch.setattr(onnx_converter, "convert", write_wrong)
    before = contents(without_fp32.parent)
    with pytest.raises(FidelityError, match="does not rank like the original"):
        convert(bert, FP32, without_fp32)
    assert contents(without_fp32.parent) == before


def nothing(folder: Path) -> None:
    """A converter that says it is done: exit code 0 and no file."""


def empty(folder: Path) -> None:
    (folder / "model.onnx").touch()


def stub(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")


def full_disk(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"half")
    raise OSError(28, "No space left on device")


def interrupted(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (nothing, FidelityError),
        (empty, FidelityError),
        (stub, ConversionError),
        (full_disk, ConversionError),
        (interrupted, KeyboardInterrupt),
    ],
)
def test_what_fails_leaves_nothing(
    write: Callable[[Path], None],
    error: type[BaseException],
    without_fp32: Path,
    bert: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Work) -> str:
        write(folder)
        return ""

    monkeypatch.setattr(onnx_converter, "convert", fail)
    before = contents(without_fp32.parent)
    for target in (without_fp32, without_fp32.with_name("new-qrank")):
        with pytest.raises(error):
            convert(bert, FP32, target)
        assert contents(without_fp32.parent) == before
        assert [path.name for path in without_fp32.parent.iterdir()] == [without_fp32.name]


def test_a_template_that_is_not_the_tokenizers_is_refused(bert: str, tmp_path: Path) -> None:
    card = tmp_path / "mine.toml"
    card.write_text(
        'name = "mine"\nabout = "RoBERTa\'s pair"\n'
        'architectures = ["BertForSequenceClassification"]\n'
        'template = ["{cls}", "{query}", "{sep}", "{sep}", "{document}", "{sep}"]\n'
        'pooling = "pooler"\nactivation = "sigmoid"\n',
        "utf-8",
    )
    with pytest.raises(ConversionError, match="other token ids than"):
        convert(bert, FP32, tmp_path / "out", family=str(card))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_a_checkpoint_of_nans_is_refused(bert: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bert, tmp_path / "broken"))
    model = AutoModelForSequenceClassification.from_pretrained(broken)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(ConversionError, match="not finite"):
        convert(str(broken), FP32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_is_refused(bert: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="onnx has no q4; it has: int8, fp16, fp32"):
        convert(bert, [("onnx", "q4")], tmp_path / "out")


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_weights_beside_the_graph(
    bert: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for models above 2 GB, with a limit that a tiny one exceeds."""
    monkeypatch.setattr(graph_file, "_LARGEST_PROTO", 0)
    name = f"onnx-{precision}"
    made = convert(bert, [("onnx", precision)], tmp_path / "out")
    target, files = made.folder, made.manifest.variants[name].files
    assert set(files) == {f"{name}/model.onnx", f"{name}/model.onnx.data"}
    assert files[f"{name}/model.onnx.data"].bytes > files[f"{name}/model.onnx"].bytes
    with Reranker(target) as reranker:
        assert len(reranker.score(PAIRS)) == 2
    data = target / name / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged"):
        Reranker(target)


# Cut short

CUT_SHORT = """
import signal, sys
# A shell's background jobs ignore Ctrl-C, and with them what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
from qrank.cli import main
main(["convert", sys.argv[1], "--to", "onnx", "--precision", "fp32", "-o", sys.argv[2]])
"""


def cut_short(source: str, target: Path, number: int) -> tuple[int, str]:
    """Start a conversion, send it a signal once it writes; its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", CUT_SHORT, source, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(target.parent.glob(f".{target.name}.partial-*")):
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


@posix
@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("add", [False, True])
def test_killed_in_the_middle(add: bool, without_fp32: Path, bert: str) -> None:
    folder = without_fp32.parent
    target = without_fp32 if add else folder / "new-qrank"
    before = contents(target) if add else {}
    code, _ = cut_short(bert, target, signal.SIGKILL)
    assert code == -signal.SIGKILL
    (partial,) = folder.glob(f".{target.name}.partial-*")
    with pytest.raises(QrankError):
        Reranker(partial)
    assert (contents(target) if target.exists() else {}) == before
    if add:
        Reranker(target).close()
    # The next run works as if nothing had been, and clears what was left.
    assert "onnx-fp32" in convert(bert, FP32, target).manifest.variants
    assert {path.name for path in folder.iterdir()} == {target.name, without_fp32.name}


@posix
def test_interrupted_in_the_middle(without_fp32: Path, bert: str) -> None:
    folder = without_fp32.parent
    before = contents(folder)
    code, errors = cut_short(bert, without_fp32, signal.SIGINT)
    assert code != 0
    assert "Traceback" not in errors
    assert contents(folder) == before
    assert [path.name for path in folder.iterdir()] == [without_fp32.name]


@posix
def test_killed_while_replacing(copy: Path, bert: str) -> None:
    """Between setting the old bundle aside and moving the new one in: the old one comes back."""
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    aside = copy.with_name(f".{copy.name}.old-{int(gone.stdout)}")
    before = contents(copy)
    copy.rename(aside)
    convert(bert, FP32, copy)
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@posix
def test_a_run_that_still_works_is_left_alone(copy: Path, bert: str) -> None:
    """What it has written so far is not taken for a leftover."""
    partial = copy.with_name(f".{copy.name}.partial-{os.getppid()}")
    partial.mkdir()
    other = copy.with_name(f".{copy.name}.partial-notes")
    other.mkdir()
    convert(bert, FP32, copy)
    assert partial.is_dir()
    assert other.is_dir()
