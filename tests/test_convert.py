"""Conversion: the contents of a bundle, adding variants to one, and the command."""

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import contents
from onnx import numpy_helper
from transformers import AutoModelForSequenceClassification

from qrank import Reranker
from qrank.backends import tolerance
from qrank.bundle.manifest import MANIFEST, TOKENIZER, FileRecord, Manifest
from qrank.cli import main
from qrank.converters.convert import convert
from qrank.converters.onnx import export as onnx_converter
from qrank.errors import BundleError, ConversionError, TargetError
from qrank.system.steps import Step

FP32 = [("onnx", "fp32")]
PAIRS = [("which planet is red?", "Mars is."), ("bread?", "Yeast ferments sugar in the dough.")]


# Contents of a bundle


def test_a_bundle_says_what_it_is_made_of(bundle: Path, bert: str) -> None:
    manifest = Manifest.load(bundle)
    assert set(manifest.variants) == {f"{f}-{p}" for f, p in tiny.VARIANTS}
    assert {path.name for path in bundle.iterdir()} == {MANIFEST, TOKENIZER, *manifest.variants}
    assert (manifest.name, manifest.source.id) == ("tiny", "tiny")
    assert manifest.source.revision is None
    assert (manifest.family.name, manifest.family.max_length) == ("bert", tiny.MAX_LENGTH)
    for variant in manifest.variants.values():
        for name, record in variant.files.items():
            assert name.startswith(f"{variant.name}/model.")
            assert FileRecord.of(bundle / name) == record
        for package in ("qrank", "torch", "transformers", variant.format):
            assert variant.tools[package] == metadata.version(package)
    size = {name: variant.bytes for name, variant in manifest.variants.items()}
    assert size["onnx-int8"] < size["onnx-fp16"] < size["onnx-fp32"]


def test_a_bundle_holds_its_proof(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    probes = manifest.probes
    assert len(probes.work) == len(probes.logits) >= 32
    assert len(set(probes.work.lengths.tolist())) > 10
    assert probes.work.lengths.max() == tiny.MAX_LENGTH
    assert "transformers" in probes.reference
    assert "fp32" in probes.reference
    for variant in manifest.variants.values():
        bar = tolerance(variant.format, variant.precision)
        assert bar.shortfall(variant.fidelity) is None
        assert variant.fidelity.spread == np.ptp(probes.logits.astype(np.float64))
    losses = [manifest.variants[f"onnx-{p}"].fidelity.max_abs for p in ("fp32", "fp16", "int8")]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_graphs_take_ids_and_give_logits_under_the_fields_names(
    kind: str, bundle_of: Callable[[str], Path]
) -> None:
    """So other tools can run them."""
    expected = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "bert")
    for precision in [name for format, name in tiny.VARIANTS if format == "onnx"]:
        path = bundle_of(kind) / f"onnx-{precision}" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == expected
        assert [o.name for o in session.get_outputs()] == ["logits"]
        assert {i.type for i in session.get_inputs()} == {"tensor(int64)"}
        assert session.get_outputs()[0].type == "tensor(float)"


HEADS = {
    "bert": ["bert.pooler.dense", "classifier"],
    "bert-one-segment": ["bert.pooler.dense", "classifier"],
    "xlm-roberta": ["classifier.dense", "classifier.out_proj"],
    "modernbert-mean": ["head.dense", "classifier"],
    "modernbert-cls": ["head.dense", "classifier"],
}


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_head_stays_fp32(
    kind: str,
    precision: str,
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
) -> None:
    """Its weights are in the graph exactly as the checkpoint has them."""
    graph = onnx.load(bundle_of(kind) / f"onnx-{precision}" / "model.onnx").graph
    floats = [
        numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT
    ]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint_of(kind))
    weights = model.state_dict()
    for name in HEADS[kind]:
        weight = weights[f"{name}.weight"].numpy()
        assert any(np.array_equal(weight, w) or np.array_equal(weight.T, w) for w in floats), name


def test_int8_weights_have_a_scale_a_column_and_tables_one_a_row(
    kind: str, bundle_of: Callable[[str], Path]
) -> None:
    graph = onnx.load(bundle_of(kind) / "onnx-int8" / "model.onnx").graph
    weights = {i.name: i for i in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    # Queries, keys and values, their output, and two in the MLP: 4 or 6 per layer.
    assert len(products) >= 8
    for node in products:
        weight, scale = weights[node.input[1]], weights[node.input[3]]
        assert weight.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [weight.dims[1]]
    tables = [
        weights[node.input[0]]
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in weights
    ]
    words = [table for table in tables if table.data_type == onnx.TensorProto.INT8]
    assert len(words) == 1
    rows = words[0].dims[0]
    assert any(list(table.dims) == [rows, 1] for table in tables)
    # Only the head, biases, norms and small tables stay in fp32, not a layer's matrices.
    for node in graph.node:
        if node.op_type == "MatMul":
            assert node.input[1] not in weights or any(
                part in node.input[1] or part in node.name
                for part in ("pooler", "classifier", "head")
            )


def test_token_types_change_the_score(bundle: Path) -> None:
    """Otherwise a conversion that dropped them could pass every other test."""
    probes = Manifest.load(bundle).probes
    assert probes.work.segments is not None
    session = onnxruntime.InferenceSession(
        bundle / "onnx-fp32" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    changed = 0
    for ids, types, logit in zip(
        probes.work.ids[:8], probes.work.segments, probes.logits, strict=False
    ):
        inputs = {
            "input_ids": ids[None].astype(np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        (right,) = session.run(None, {**inputs, "token_type_ids": types[None].astype(np.int64)})
        (wrong,) = session.run(None, {**inputs, "token_type_ids": np.zeros((1, len(ids)), int)})
        assert abs(right.item() - logit) < 1e-3
        changed += abs(wrong.item() - logit) > 1e-2
    assert changed == 8


def test_json_of_the_manifest_is_plain(bundle: Path) -> None:
    """Any JSON parser can read it: no NaN, no Infinity."""

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    json.loads((bundle / MANIFEST).read_text("utf-8"), parse_constant=refuse)


def test_graphs_do_not_say_where_they_were_made(bundle: Path) -> None:
    """The exporter records the Python file that each node comes from: paths on this machine."""
    here = str(Path(onnx.__file__).parent.parent).encode()
    for path in bundle.glob("*/model.onnx"):
        assert here not in path.read_bytes(), path
        assert b"Traceback" not in path.read_bytes()
        assert b"stack_trace" not in path.read_bytes()


# Adding to a bundle


def test_a_variant_is_added_and_the_others_stay(without_fp32: Path, bert: str) -> None:
    # As left by a run that was killed between moving the variant in and writing the manifest.
    leftover = without_fp32 / "onnx-fp32"
    leftover.mkdir()
    (leftover / "model.onnx").write_bytes(b"half")
    with pytest.raises(TargetError, match="no variant"):
        Reranker(without_fp32, backend="onnx-fp32")
    before = contents(without_fp32)
    old = Manifest.load(without_fp32)

    made = convert(bert, FP32, without_fp32)
    target, manifest = made.folder, made.manifest

    assert target == without_fp32
    assert set(manifest.variants) == {f"{f}-{p}" for f, p in tiny.VARIANTS}
    assert Manifest.load(target).digest == manifest.digest
    after = contents(target)
    for name, content in before.items():
        if name not in (MANIFEST, "onnx-fp32/model.onnx"):
            assert after[name] == content
    assert manifest.probes.logits.tobytes() == old.probes.logits.tobytes()
    for backend in manifest.variants:
        with Reranker(target, backend=backend) as reranker:
            assert len(reranker.score(PAIRS)) == 2
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_model_is_traced_once_for_all_its_graphs(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of a conversion's time; nothing of the model's size is kept for it."""
    traced: list[object] = []
    original = torch.onnx.export

    def export(*args: Any, **options: Any) -> Any:
        traced.append(args[0])
        return original(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(onnx_converter, "_traced", {})
    variants = [("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp16")]
    steps: list[str] = []
    result = convert(bert, variants, tmp_path / "b", progress=steps.append)
    assert not result.failed
    counted = [(str(s), s.done, s.total) for s in steps if isinstance(s, Step)]
    assert counted[:2] == [("converting to onnx-fp32", 0, 3), ("proving onnx-fp32", 0, 3)]
    assert counted[-1] == ("proving openvino-fp16", 2, 3)
    assert len(traced) == 1
    (graph,) = onnx_converter._traced.values()
    kept = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value)
    assert kept < Path(bert, "model.safetensors").stat().st_size / 20


def test_the_same_variant_again_changes_nothing(copy: Path, bert: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    steps: list[str] = []
    convert(bert, tiny.VARIANTS, copy, progress=steps.append)
    assert steps == ["reading the model"]
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_another_checkpoint_is_refused(copy: Path, checkpoint_of: Callable[[str], Path]) -> None:
    """Even if its folder has the same name: only the fingerprint counts."""
    before = contents(copy)
    with pytest.raises(ConversionError, match=r"another checkpoint.*--force"):
        convert(str(checkpoint_of("bert-one-segment")), FP32, copy)
    assert contents(copy) == before


@pytest.mark.parametrize("change", ["weights", "tokenizer", "config"])
def test_a_changed_checkpoint_is_another_one(
    change: str, copy: Path, bert: str, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(bert, tmp_path / "changed" / "tiny"))
    if change == "config":
        tiny.edit_config(changed, layer_norm_eps=1e-6)
    elif change == "weights":
        model = AutoModelForSequenceClassification.from_pretrained(changed)
        with torch.no_grad():
            model.classifier.bias += 1
        model.save_pretrained(changed)
    else:
        path = changed / "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        vocabulary = content["model"]["vocab"]
        one, two = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ConversionError, match="another checkpoint"):
        convert(str(changed), FP32, copy)


@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("damaged", [False, True])
def test_force_replaces_the_bundle_and_nothing_else(damaged: bool, copy: Path, bert: str) -> None:
    (copy / "notes.txt").write_text("mine", "utf-8")
    (copy / "onnx-int8" / "notes.txt").write_text("mine too", "utf-8")
    if damaged:
        (copy / MANIFEST).write_text("{", "utf-8")
    manifest = convert(bert, FP32, copy, force=True).manifest
    assert list(manifest.variants) == ["onnx-fp32"]
    assert set(contents(copy)) == {
        MANIFEST,
        TOKENIZER,
        "onnx-fp32/model.onnx",
        "onnx-int8/notes.txt",
        "notes.txt",
    }
    assert sorted(path.name for path in copy.iterdir() if path.is_dir()) == [
        "onnx-fp32",
        "onnx-int8",
    ]
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    Reranker(copy).close()


def test_what_is_no_bundle_is_refused(bert: str, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work", "utf-8")
    for force in (False, True):
        with pytest.raises(ConversionError, match=r"is no bundle: it holds chapter.txt"):
            convert(bert, FP32, folder, force=force)
        with pytest.raises(ConversionError, match=r"chapter\.txt is a file; name a folder"):
            convert(bert, FP32, folder / "chapter.txt", force=force)
        with pytest.raises(ConversionError, match=r"chapter\.txt is a file; name another folder"):
            convert(bert, FP32, folder / "chapter.txt" / "out", force=force)
        assert contents(folder) == {"chapter.txt": b"years of work"}


def test_a_damaged_bundle_is_not_added_to(without_fp32: Path, bert: str) -> None:
    (without_fp32 / MANIFEST).write_text("{", "utf-8")
    with pytest.raises(BundleError):
        convert(bert, FP32, without_fp32)


@pytest.mark.usefixtures("ready_graph")
def test_an_empty_folder_is_filled(bert: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    convert(bert, FP32, folder)
    with Reranker(folder) as reranker:
        assert len(reranker.score(PAIRS)) == 2


@pytest.mark.usefixtures("ready_graph")
def test_the_default_output_is_named_after_the_checkpoint(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(bert, FP32).folder == tmp_path / "tiny-qrank"


# The command


@pytest.mark.usefixtures("ready_graph")
def test_the_command_shows_the_proof_and_what_to_do_next(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["convert", bert, "--to", "onnx", "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "onnx-fp32" in result.stdout
    assert "Kendall" in result.stdout
    assert "qrank score -m ./tiny-qrank" in result.stdout


@pytest.mark.usefixtures("ready_graph")
def test_a_precision_named_twice_makes_both(bert: str, without_fp32: Path) -> None:
    target = without_fp32
    manifest = Manifest.load(target)
    del manifest.variants["onnx-fp16"]
    manifest.save(target)
    both = ["--precision", "fp16", "--precision", "fp32", "--precision", "fp32"]
    result = CliRunner().invoke(main, ["convert", bert, "--to", "onnx", *both, "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert list(Manifest.load(target).variants)[-2:] == ["onnx-fp16", "onnx-fp32"]
    assert "onnx-fp16" in result.stdout
    assert "onnx-fp32" in result.stdout


@pytest.mark.parametrize("formats", [[], ["--to", "onnx", "--to", "gguf"]])
def test_a_precision_goes_with_one_format(formats: list[str], bert: str, tmp_path: Path) -> None:
    command = ["convert", bert, *formats, "--precision", "fp32", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "exactly one --to" in result.stderr
    assert not any(tmp_path.iterdir())


def test_the_command_refuses_in_one_line(copy: Path, checkpoint_of: Callable[[str], Path]) -> None:
    other = str(checkpoint_of("xlm-roberta"))
    result = CliRunner().invoke(main, ["convert", other, "--to", "onnx", "-o", str(copy)])
    assert result.exit_code == ConversionError.exit_code
    assert result.stderr.startswith("qrank: error: ")
    assert result.stderr.count("\n") == 1
