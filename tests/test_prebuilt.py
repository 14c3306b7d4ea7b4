"""Prebuilt files: they become bundles whose scores match those of transformers."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import prebuilt_files
import pytest
import test_conformance
import test_decoders
import tiny_decoders
from click.testing import CliRunner

from qrank import Reranker
from qrank.backends import tolerance
from qrank.backends.openvino_nodes import computed_weights
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.bundle.sequences import Logits
from qrank.cli import main
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FidelityError, ModelNotFoundError
from qrank.scoring.pair_tokenizer import PairTokenizer

Folders = Callable[[str], Path]
TYPES = ["input_ids", "attention_mask", "token_type_ids"]
POSITIONS = ["input_ids", "attention_mask", "position_ids"]


def quantized(checkpoint: Path, target: Path) -> None:
    """Write one graph in four precisions to one folder, as in Xenova's repositories."""
    source = prebuilt_files.onnx_causal(checkpoint, target) / "onnx" / "model.onnx"
    prebuilt_files.onnx_int8(source, source.with_name("model_quantized.onnx"))
    prebuilt_files.onnx_int4(source, source.with_name("model_q4.onnx"))
    prebuilt_files.onnx_fp16(source, source.with_name("model_fp16.onnx"))


def both(checkpoint: Path, target: Path, names: list[str]) -> None:
    """Write one graph in two formats; OpenVINO's is int8."""
    prebuilt_files.onnx_classifier(checkpoint, target, names)
    prebuilt_files.openvino_from_onnx(target, int8=True)


def whole(checkpoint: Path, target: Path) -> None:
    """Write a causal model without a KV cache, in two formats."""
    prebuilt_files.onnx_causal(checkpoint, target, cache=False)
    prebuilt_files.openvino_from_onnx(target)


LAYOUTS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "state": ("qwen3", lambda c, t: prebuilt_files.openvino_causal(c, t, int8=True)),
    "inputs": ("gemma", lambda c, t: prebuilt_files.openvino_causal(c, t, stateful=False)),
    "whole": ("qwen3", whole),
    "xenova": ("zerank", quantized),
    "pooled": ("qwen3-seq-cls", lambda c, t: both(c, t, POSITIONS)),
    "types": ("bert", lambda c, t: both(c, t, TYPES)),
    "positions": ("xlm-roberta", lambda c, t: both(c, t, POSITIONS)),
}
"""Layout -> the kind of checkpoint, and the function that writes the folder."""

ROWS = [
    ("state", "", "openvino-int8"),
    ("inputs", "", "openvino-fp32"),
    ("whole", "openvino_model.xml", "openvino-fp32"),
    ("whole", "onnx/model.onnx", "onnx-fp32"),
    ("xenova", "", "onnx-int8"),
    ("xenova", "onnx/model_q4.onnx", "onnx-int4"),
    ("xenova", "onnx/model_fp16.onnx", "onnx-fp16"),
    ("xenova", "onnx/model.onnx", "onnx-fp32"),
    ("pooled", "openvino_model.xml", "openvino-int8"),
    ("pooled", "onnx", "onnx-fp32"),
    ("types", "openvino_model.xml", "openvino-int8"),
    ("types", "onnx/model.onnx", "onnx-fp32"),
    ("positions", "openvino_model.xml", "openvino-int8"),
    ("positions", "onnx/model.onnx", "onnx-fp32"),
]
"""A layout, its file to convert (the folder if empty), and the resulting variant."""


@pytest.fixture(scope="session")
def layout_of(
    checkpoint_of: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a layout's read-only folder, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            kind, make = LAYOUTS[name]
            made[name] = tmp_path_factory.mktemp(name) / f"their-{kind}"
            make(checkpoint_of(kind), made[name])
        return made[name]

    return get


def family_of(layout: str) -> str | None:
    return tiny_decoders.FAMILIES.get(LAYOUTS[layout][0])


def expected(layout: str, checkpoint_of: Folders) -> tuple[list[tuple[str, str]], Logits]:
    """Pairs, and their logits from transformers."""
    kind = LAYOUTS[layout][0]
    if family_of(layout):
        return test_decoders.PAIRS, test_decoders.reference(kind, checkpoint_of(kind))
    return test_conformance.PAIRS, test_conformance.reference(checkpoint_of(kind))[0]


@pytest.mark.parametrize(("layout", "file", "name"), ROWS, ids=lambda part: part or "folder")
def test_it_scores_as_transformers_does(
    layout: str,
    file: str,
    name: str,
    layout_of: Folders,
    checkpoint_of: Folders,
    tmp_path: Path,
) -> None:
    source = str(layout_of(layout) / file)
    made = convert(source, None, tmp_path / "out", family=family_of(layout))
    target, manifest = made.folder, made.manifest
    pairs, theirs = expected(layout, checkpoint_of)
    assert list(manifest.variants) == [name]
    assert not manifest.probes.verified
    with Reranker(
        target, compute_dtype="fp32" if name.startswith("openvino") else None
    ) as reranker:
        ours = reranker.score(pairs, raw=True)
        ranked = reranker.rank(pairs[0][0], [d for q, d in pairs if q == pairs[0][0]])
    bar = tolerance(*name.split("-", 1))
    assert bar.shortfall(Fidelity.of(ours, theirs)) is None
    # The logits are the same with a shared prefix and in any batch.
    spread = max(1.0, float(np.ptp(theirs)))
    alone = [ours[i] for i, (q, _) in enumerate(pairs) if q == pairs[0][0]]
    together = [item.logit for item in sorted(ranked, key=lambda item: item.index)]
    np.testing.assert_allclose(together, alone, atol=bar.share / 5 * spread)


def test_no_stream_computes_a_head_of_8_bits(layout_of: Folders, tmp_path: Path) -> None:
    """OpenVINO's streams overwrote each other's results for it: at times all scores were wrong."""
    theirs, core = layout_of("pooled"), ov.Core()
    before = core.compile_model(theirs / "openvino_model.xml", "CPU", {"NUM_STREAMS": 2})
    assert computed_weights(before)
    source = str(theirs / "openvino_model.xml")
    made = convert(source, None, tmp_path / "out", family=family_of("pooled"))
    file = made.folder / "openvino-int8" / "model.xml"
    after = core.compile_model(file, "CPU", {"NUM_STREAMS": 2})
    assert not computed_weights(after)


# Cutting a causal model's graph


@pytest.mark.parametrize(
    ("layout", "file", "variant"),
    [
        ("state", "openvino_model.xml", "openvino-int8/model.xml"),
        ("inputs", "openvino_model.xml", "openvino-fp32/model.xml"),
        ("xenova", "onnx/model_quantized.onnx", "onnx-int8/model.onnx"),
        ("xenova", "onnx/model_q4.onnx", "onnx-int4/model.onnx"),
    ],
)
def test_the_cut_changes_nothing(
    layout: str, file: str, variant: str, layout_of: Folders, tmp_path: Path
) -> None:
    """The head is computed with the graph's own weights, in whatever type they are stored."""
    source = layout_of(layout) / file
    made = convert(str(source), None, tmp_path / "out", family=family_of(layout))
    target, manifest = made.folder, made.manifest
    tokenizer = PairTokenizer(target / TOKENIZER, manifest.family)
    run_theirs, run_ours = prebuilt_files.runner(source), prebuilt_files.runner(target / variant)
    labels, ours, theirs = manifest.family.labels, [], []
    for pair in [(q, d) for q, d in test_decoders.PAIRS if len(d) < 200]:
        ids = tokenizer.whole(*pair)[0][None].astype(np.int64)
        last = run_theirs(ids)[0, -1]
        theirs.append(float(last[labels[0]] - sum(last[i] for i in labels[1:])))
        ours.append(run_ours(ids).item())
    # The original quantizes its head's inputs to int8: allow for that rounding.
    share = 0.02 if "quantized" in file else 1e-5
    np.testing.assert_allclose(ours, theirs, atol=share * max(1.0, np.ptp(theirs)))


def test_nothing_is_as_large_as_the_vocabulary(layout_of: Folders, tmp_path: Path) -> None:
    source = str(layout_of("xenova") / "onnx" / "model.onnx")
    target = convert(source, None, tmp_path / "out", family="zerank").folder
    graph = onnx.load(target / "onnx-fp32" / "model.onnx").graph
    words = max(max(weight.dims, default=0) for weight in graph.initializer)
    large = [w.name for w in graph.initializer if words in w.dims]
    assert len(large) == 1, "the embeddings"
    assert [i.name for i in graph.input] == ["input_ids", "last", "prefix", "keep"]
    assert [o.name for o in graph.output] == ["logits", "present"]


def test_a_graph_without_a_cache_says_so(layout_of: Folders, tmp_path: Path) -> None:
    source = str(layout_of("whole") / "onnx" / "model.onnx")
    manifest = convert(source, None, tmp_path / "out", family="qwen3-reranker").manifest
    (variant,) = manifest.variants.values()
    assert "a prompt is read anew with every document" in variant.note


# What the bundle reports


def test_not_verified_is_told_and_verified_is_not(
    layout_of: Folders, checkpoint_of: Folders, tmp_path: Path
) -> None:
    source, command = str(layout_of("types")), ["convert", "--to", "openvino"]
    made = CliRunner().invoke(main, [*command, source, "-o", str(tmp_path / "alone")])
    assert made.exit_code == 0, made.stderr
    assert "openvino-int8" in made.stdout
    assert "self-consistent, not verified" in made.stdout
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "alone"), "--verify"])
    assert "self-consistent, not verified" in shown.stdout
    assert "the prebuilt openvino-int8 itself" in shown.stdout
    assert Manifest.load(tmp_path / "alone").probes.verified is False

    reference = ["--reference", str(checkpoint_of("bert"))]
    made = CliRunner().invoke(main, [*command, source, *reference, "-o", str(tmp_path / "proven")])
    assert made.exit_code == 0, made.stderr
    assert "not verified" not in made.stdout
    manifest = Manifest.load(tmp_path / "proven")
    assert "BertForSequenceClassification, fp32" in manifest.probes.reference
    assert manifest.variants["openvino-int8"].fidelity.max_abs > 0
    # It is the checkpoint's bundle, so converting the checkpoint adds variants to it.
    grown = convert(str(checkpoint_of("bert")), [("onnx", "fp32")], tmp_path / "proven").manifest
    assert list(grown.variants) == ["openvino-int8", "onnx-fp32"]


def test_a_reference_that_it_is_not_like_refuses_it(
    layout_of: Folders, checkpoint_of: Folders, tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint_of("bert"), tmp_path / "other")
    from safetensors.numpy import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["classifier.weight"] = -weights["classifier.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    source = str(layout_of("types") / "openvino_model.xml")
    with pytest.raises(FidelityError, match="openvino-int8 does not rank like the original"):
        convert(source, None, tmp_path / "out", reference=str(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_several_files_are_held_against_the_most_exact(layout_of: Folders, tmp_path: Path) -> None:
    manifest = convert(str(layout_of("types")), None, tmp_path / "out").manifest
    assert list(manifest.variants) == ["onnx-fp32", "openvino-int8"]
    assert "onnx-fp32" in manifest.probes.reference
    assert 0.01 < manifest.variants["openvino-int8"].fidelity.max_abs < 1
    same = convert(str(layout_of("types")), None, tmp_path / "out").manifest
    assert same.digest == manifest.digest


def test_a_repository_of_the_hub_gives_what_is_needed_and_no_more(
    layout_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, cached = layout_of("xenova"), tmp_path / "0123abcd"
    taken: list[str] = []

    def snapshot(repository: str, allow_patterns: list[str], **_: Any) -> str:
        for path in theirs.rglob("*"):
            name = path.relative_to(theirs).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cached / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cached / name)
                taken.append(name)
        return str(cached)

    names = [p.relative_to(theirs).as_posix() for p in theirs.rglob("*") if p.is_file()]
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: names)
    manifest = convert("they/zerank-onnx", None, tmp_path / "out", family="zerank").manifest
    assert set(taken) == {*prebuilt_files.TOKENIZER_FILES, "onnx/model_quantized.onnx"}
    assert (manifest.name, manifest.source.revision) == ("zerank-onnx", "0123abcd")
    file = "they/zerank-onnx/onnx/model_q4.onnx"
    manifest = convert(file, None, tmp_path / "q4", family="zerank").manifest
    assert list(manifest.variants) == ["onnx-int4"]


# Refusals


@pytest.mark.parametrize(
    ("kind", "inputs", "width", "end", "message"),
    [
        ("bert", TYPES[:2], [1], "", "family bert needs token_type_ids too"),
        ("bert", TYPES[:1], [1], "", "needs attention_mask, token_type_ids too"),
        ("bert", [*TYPES, "pixels"], [1], "", "takes pixels, which is not understood"),
        ("bert", TYPES, [2], "", r"logits of shape \[\?, 2\]; one logit a pair"),
        ("bert", TYPES, [1], "Sigmoid", "ends in Sigmoid; raw logits were expected"),
        ("bert", TYPES, [7, 1200], "", r"of shape \[\?, 7, 1200\]; one logit a pair"),
        ("qwen3", TYPES[:2], [1], "", r"shape \[\?, 1\]; .* \[batch, length, vocabulary\]"),
        ("qwen3", TYPES[:2], [7, 1200], "", "come out of Identity"),
        ("qwen3", [*TYPES[:2], "past_key_values.0.key"], [7, 1200], "", "cache of 1 tensors"),
        ("qwen3-seq-cls", [*TYPES[:2], "past_key_values.0.key"], [1], "", "takes past_key_values"),
        ("qwen3", [*TYPES[:2], "use_cache_branch"], [7, 1200], "", "takes use_cache_branch"),
    ],
)
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_graph_that_is_not_understood_is_refused(
    format: str,
    kind: str,
    inputs: list[str],
    width: list[int],
    end: str,
    message: str,
    checkpoint_of: Folders,
    tmp_path: Path,
) -> None:
    folder = prebuilt_files.onnx_toy(checkpoint_of(kind), tmp_path / "toy", inputs, width, end)
    if format == "openvino":
        graph = ov.convert_model(folder / "model.onnx")
        ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
        message = message.replace("Identity", "Multiply")
    family = tiny_decoders.FAMILIES.get(kind)
    with pytest.raises(ConversionError, match=message):
        convert(str(folder), [(format, None)], tmp_path / "out", family=family)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_state_of_something_else_is_refused(checkpoint_of: Folders, tmp_path: Path) -> None:
    folder = prebuilt_files.describe(checkpoint_of("qwen3"), tmp_path / "theirs")
    op = ov.opset13
    ids = op.parameter([-1, -1], ov.Type.i64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    memory = op.read_value(op.constant(np.zeros((1, 1), np.float32)), "memory")
    total = op.add(memory, op.convert(ids, "f32"))
    graph = ov.Model([total.output(0)], [op.assign(total, "memory")], [ids])
    ov.save_model(graph, folder / "openvino_model.xml")
    with pytest.raises(ConversionError, match="the graph's state memory is not understood"):
        convert(str(folder), None, tmp_path / "out", family="qwen3-reranker")


def test_a_graph_that_tells_no_pairs_apart_is_refused(
    checkpoint_of: Folders, tmp_path: Path
) -> None:
    folder = prebuilt_files.onnx_toy(checkpoint_of("bert"), tmp_path / "toy", TYPES)
    model = onnx.load(folder / "model.onnx")
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.zeros((1, 1), np.float32), "weights")
    )
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ConversionError, match="does not tell pairs apart"):
        convert(str(folder), None, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"), [("model.onnx", b"onnx"), ("a.gguf", b"GGUF"), ("m.xml", b"<net")]
)
def test_a_damaged_file_is_refused(
    name: str, content: bytes, checkpoint_of: Folders, tmp_path: Path
) -> None:
    folder = prebuilt_files.describe(checkpoint_of("bert"), tmp_path / "theirs")
    (folder / name).write_bytes(content)
    with pytest.raises(ConversionError, match="cannot read"):
        convert(str(folder), None, tmp_path / "out")


def test_of_several_files_what_is_damaged_or_missing_is_left_out(
    layout_of: Folders, tmp_path: Path
) -> None:
    theirs = Path(shutil.copytree(layout_of("types"), tmp_path / "theirs"))
    (theirs / "openvino_model.xml").write_bytes(b"<net")
    variants = [("onnx", None), ("openvino", None), ("gguf", None), ("onnx", "int8")]
    made = convert(str(theirs), variants, tmp_path / "out")
    assert list(made.manifest.variants) == ["onnx-fp32"]
    reasons = {name: str(error) for name, error in made.failed.items()}
    assert "openvino cannot read" in reasons["openvino_model.xml"]
    assert "and none of gguf" in reasons["gguf"]
    assert "model.onnx is fp32, and not int8" in reasons["model.onnx"]


def test_what_is_missing_or_unclear_is_told(
    checkpoint_of: Folders, layout_of: Folders, tmp_path: Path
) -> None:
    toy = prebuilt_files.onnx_toy(checkpoint_of("bert"), tmp_path / "toy", TYPES)
    with pytest.raises(ConversionError, match="files of onnx and none of gguf"):
        convert(str(toy), [("gguf", None)], tmp_path / "out")
    with pytest.raises(ConversionError, match=r"model\.onnx is fp32, and not int8"):
        convert(str(toy), [("onnx", "int8")], tmp_path / "out")
    with pytest.raises(ConversionError, match="--calibration is for quantizing"):
        convert(str(toy), None, tmp_path / "out", calibration=tmp_path / "pairs.jsonl")
    shutil.copy(toy / "model.onnx", toy / "other.onnx")
    (toy / "model.onnx").rename(toy / "another.onnx")
    with pytest.raises(ConversionError, match=r"several onnx files: another.onnx, other.onnx; nam"):
        convert(str(toy), None, tmp_path / "out")
    (toy / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no config.json.*--reference"):
        convert(str(toy / "other.onnx"), None, tmp_path / "out")
    with pytest.raises(ConversionError, match="--reference is what prebuilt files are proven"):
        convert(str(checkpoint_of("bert")), None, tmp_path / "out", reference="some/model")
    assert not (tmp_path / "out").exists()
