"""Failing conversions: each variant is refused individually, with its reason."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import contents
from onnx import numpy_helper
from transformers import AutoModelForSequenceClassification

from qrank import Reranker
from qrank.bundle.fidelity import Tolerance
from qrank.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from qrank.bundle.sequences import Sequences
from qrank.cli import main
from qrank.converters import graph_file, makers
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.convert import convert
from qrank.converters.onnx import export as onnx_converter
from qrank.converters.resources import versions
from qrank.errors import BundleError, ConversionError, FidelityError, InputError, MissingExtraError

FP32 = [("onnx", "fp32")]
PAIRS = [("which planet is red?", "Mars is."), ("bread?", "Yeast ferments sugar in the dough.")]


# The proof


@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("add", [False, True])
def test_a_variant_below_its_tolerance_is_refused(
    add: bool, without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = without_fp32 if add else without_fp32.with_name("new-qrank")
    before = contents(without_fp32.parent)
    exact = Tolerance(0.0, 1.0)
    monkeypatch.setattr("qrank.converters.fidelity.tolerance", lambda *name: exact)
    with pytest.raises(FidelityError, match=r"onnx-fp32 .* max \|Δlogit\| is .* at most 0 allowed"):
        convert(bert, FP32, target)
    assert contents(without_fp32.parent) == before
    assert [path.name for path in target.parent.iterdir()] == [without_fp32.name]


def wrong_head(graph: onnx.GraphProto) -> None:
    """Make the pooler's matrix the identity, as if omitted like in llama.cpp's converter."""
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
    def write_wrong(
        checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
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
    """Write no file, like a converter that reports success (exit code 0)."""


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
    def fail(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
        write(folder)
        return ""

    monkeypatch.setattr(onnx_converter, "convert", fail)
    before = contents(without_fp32.parent)
    for target in (without_fp32, without_fp32.with_name("new-qrank")):
        with pytest.raises(error):
            convert(bert, FP32, target)
        assert contents(without_fp32.parent) == before
        assert [path.name for path in without_fp32.parent.iterdir()] == [without_fp32.name]


def test_a_template_that_is_not_the_tokenizers_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    card = tmp_path / "mine.toml"
    card.write_text(
        'name = "mine"\nabout = "RoBERTa\'s pair"\n'
        'architectures = ["BertForSequenceClassification"]\n'
        'template = ["{cls}", "{query}", "{sep}", "{sep}", "{document}", "{sep}"]\n'
        'pooling = "pooler"\nactivation = "sigmoid"\n',
        "utf-8",
    )
    bert = checkpoint_of("bert-one-segment")
    with pytest.raises(ConversionError, match="other token ids than"):
        convert(str(bert), FP32, tmp_path / "out", family=str(card))
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


def test_an_unknown_format_or_precision_is_refused(bert: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="variants is empty"):
        convert(bert, [], tmp_path / "out")
    with pytest.raises(ConversionError, match="no format 'convert'; there are: onnx, "):
        convert(bert, [("convert", None)], tmp_path / "out")
    with pytest.raises(ConversionError, match="onnx has no q4; it has: int8, fp16, fp32"):
        convert(bert, [("onnx", "q4")], tmp_path / "out")


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_weights_beside_the_graph(
    bert: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for models above 2 GB, with the limit set so low that a tiny model exceeds it."""
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


# Each variant individually


@pytest.fixture
def one_variant(copy: Path) -> Path:
    """A bundle to add variants to: it has its probes, so the reference need not run."""
    manifest = Manifest.load(copy)
    kept = manifest.variants["onnx-fp16"]
    replace(manifest, variants={kept.name: kept}).save(copy)
    for name in manifest.variants.keys() - {kept.name}:
        shutil.rmtree(copy / name)
    return copy


@pytest.fixture
def failing(
    ready_graph: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Exception], None]:
    """Make a format's converter fail after writing half of a file; onnx still works."""

    def fail(format: str, error: Exception) -> None:
        def convert(
            checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
        ) -> str:
            (folder / "half").write_bytes(b"half")
            raise error

        monkeypatch.setattr(f"qrank.converters.{format}.export.convert", convert)

    return fail


ALL = ["--to", "onnx", "--to", "openvino", "--to", "gguf"]


@pytest.mark.parametrize(
    ("named", "first", "code"),
    [
        ([], FidelityError("is too far from it"), 0),
        (ALL, ConversionError("knows no such operation"), ConversionError.exit_code),
        (ALL, FidelityError("is too far from it"), FidelityError.exit_code),
        (ALL, MissingExtraError('pip install "qrank[gguf]"'), ConversionError.exit_code),
    ],
)
def test_what_is_proven_is_kept_and_the_rest_told(
    named: list[str],
    first: Exception,
    code: int,
    failing: Callable[[str, Exception], None],
    one_variant: Path,
    bert: str,
) -> None:
    failing("openvino", first)
    failing("gguf", RuntimeError("Check 'is_static()'\n  failed"))
    target = one_variant
    result = CliRunner().invoke(main, ["convert", bert, *named, "-o", str(target)])
    assert result.exit_code == code, result.output
    assert f"openvino-int8 was not made: {first}" in result.stderr
    reason = "gguf-q4_k_m cannot be made: RuntimeError: Check 'is_static()' failed"
    assert f"gguf-q4_k_m was not made: {reason}" in result.stderr
    assert "is ready" in result.stdout
    assert list(Manifest.load(target).variants) == ["onnx-fp16", "onnx-int8"]
    assert {path.name for path in target.iterdir()} == {
        "onnx-fp16",
        "onnx-int8",
        MANIFEST,
        TOKENIZER,
    }


def test_where_nothing_can_be_made_every_reason_is_told(
    failing: Callable[[str, Exception], None], one_variant: Path, bert: str
) -> None:
    failing("openvino", FidelityError("is too far from it"))
    failing("gguf", ConversionError("knows no such operation"))
    before = contents(one_variant)
    variants = [("openvino", "fp16"), ("gguf", "f16")]
    with pytest.raises(FidelityError) as caught:
        convert(bert, variants, one_variant)
    assert str(caught.value).splitlines() == [
        "nothing could be made:",
        "  openvino-fp16: is too far from it",
        "  gguf-f16: knows no such operation",
    ]
    # Variants that the bundle already has count as made.
    made = convert(bert, [("onnx", "fp16"), *variants], one_variant)
    assert list(made.failed) == ["openvino-fp16", "gguf-f16"]
    assert contents(one_variant) == before


def test_a_package_that_is_missing_fails_its_format_alone(
    failing: Callable[[str, Exception], None],
    one_variant: Path,
    bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(makers, "installed", lambda module: module != "llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    made = convert(bert, [*FP32, ("gguf", None)], one_variant)
    assert list(made.manifest.variants) == ["onnx-fp16", "onnx-fp32"]
    assert [*made.failed] == ["gguf-q4_k_m"]
    assert 'pip install "qrank[gguf]"' in str(made.failed["gguf-q4_k_m"])
    with pytest.raises(MissingExtraError, match="llama_cpp"):
        convert(bert, [("gguf", None)], tmp_path / "other")


def test_a_family_says_which_formats_are_not_for_it(
    failing: Callable[[str, Exception], None],
    one_variant: Path,
    bert: str,
    tmp_path: Path,
) -> None:
    card = tmp_path / "mine.toml"
    text = resources.files("qrank.models").joinpath("bert.toml").read_text("utf-8")
    card.write_text(text + '\nunsupported = ["gguf", "openvino"]\n', "utf-8")
    command = ["convert", bert, "--family", str(card), "-o", str(one_variant)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert list(Manifest.load(one_variant).variants) == ["onnx-fp16", "onnx-int8"]
    assert "models of family bert cannot be run as gguf" in result.stderr
    result = CliRunner().invoke(main, [*command, "--to", "gguf"])
    assert result.exit_code == ConversionError.exit_code
    assert "error: models of family bert cannot be run as gguf" in result.stderr


def test_onnxruntime_may_be_another_build(
    failing: Callable[[str, Exception], None],
    without_fp32: Path,
    bert: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """onnxruntime-gpu provides the same module."""
    version = metadata.version

    def of_other(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return "9.9" if name == "onnxruntime-gpu" else version(name)

    monkeypatch.setattr(metadata, "version", of_other)
    others = {"onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr("qrank.converters.resources._distributions", lambda: others)
    tools = convert(bert, FP32, without_fp32).manifest.variants["onnx-fp32"].tools
    assert tools["onnxruntime-gpu"] == "9.9"
    assert "onnxruntime" not in tools
    monkeypatch.setattr("qrank.converters.resources._distributions", dict)
    assert versions(("onnxruntime",)) == {"onnxruntime": onnxruntime.__version__}
