"""`qrank export`: what other programs load, and that they compute qrank's scores from it."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import tiny
import tiny_encoders
from click.testing import CliRunner
from conftest import contents
from huggingface_hub import metadata_load
from numpy.typing import NDArray
from odd_texts import odd_texts
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from qrank import Reranker
from qrank.backends import tolerance
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.locate import locate
from qrank.bundle.manifest import TOKENIZER, FileRecord, Manifest, Probes, Variant
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Sequences
from qrank.cli import main
from qrank.converters import graph_file
from qrank.converters.checkpoint.configuration import OWN_CLASSES
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.export import NAMES, export
from qrank.converters.exported_graph import write_graph
from qrank.converters.graph_file import load_graph, save_graph
from qrank.errors import ConversionError, InputError
from qrank.scoring.pair_tokenizer import PairTokenizer

QUERY = "Which 惑星 is known as the “red planet”, naïvely?"
TEXTS = [text[:3000] for text in odd_texts(120)]
SHORT = [text for text in TEXTS if len(text) < 80]
KINDS = [*tiny.CHECKPOINTS, *tiny_encoders.CHECKPOINTS]


def encoded(folder: Path, texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """A graph's inputs, by the tokenizers package alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = tokenizer.encode_batch([(QUERY, text) for text in texts])
    return {
        "input_ids": np.array([pair.ids for pair in pairs]),
        "attention_mask": np.array([pair.attention_mask for pair in pairs]),
        "token_type_ids": np.array([pair.type_ids for pair in pairs]),
    }


def run_onnx(folder: Path, name: str, texts: list[str]) -> NDArray[np.float32]:
    """Logits of a graph with onnxruntime's default settings, 8 pairs at a time."""
    session = onnxruntime.InferenceSession(str(folder / name))
    taken = {i.name for i in session.get_inputs()}
    found = []
    for start in range(0, len(texts), 8):
        inputs = encoded(folder, texts[start : start + 8])
        found += session.run(["logits"], {n: x for n, x in inputs.items() if n in taken})
    logits: NDArray[np.float32] = np.concatenate(found)
    assert logits.shape == (len(texts), 1)
    return logits[:, 0]


def run_openvino(folder: Path, name: str, texts: list[str]) -> NDArray[np.float32]:
    """Logits of a graph in OpenVINO, in fp32."""
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = ov.Core().compile_model(folder / name, "CPU", options)
    taken = {i.any_name for i in model.inputs}
    inputs = encoded(folder, texts)
    found = model({n: x for n, x in inputs.items() if n in taken})["logits"]
    logits: NDArray[np.float32] = found[:, 0]
    return logits


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mini`, exported by the command."""
    folder = tmp_path_factory.mktemp("export") / "mini"
    done = CliRunner().invoke(main, ["export", "mini", "-o", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sorted(done.output.split()) == sorted(str(folder / name) for name in contents(folder))
    return folder


def test_mini_scores_the_same_elsewhere(mini: Path) -> None:
    with Reranker("mini", backend="onnx") as reranker:
        # The long one by itself: a batch is padded.
        for texts in (SHORT[:50], ["the red planet " * 400]):
            ours = reranker.score([(QUERY, text) for text in texts], raw=True)
            theirs = run_onnx(mini, "onnx/model_quantized.onnx", texts)
            np.testing.assert_allclose(theirs, ours, atol=1e-4)
    # 4.5 was the error on CPUs without VNNI. On the others this test would pass with any weights.
    graph = onnx.load(mini / "onnx/model_quantized.onnx", load_external_data=False)
    integers = {n.input[1] for n in graph.graph.node if n.op_type == "MatMulIntegerToFloat"}
    kinds = {t.data_type for t in graph.graph.initializer if t.name in integers}
    assert kinds == {onnx.TensorProto.UINT8}


def test_mini_describes_itself(mini: Path) -> None:
    config = AutoConfig.from_pretrained(mini)
    assert (config.model_type, config.num_labels, config.num_hidden_layers) == ("bert", 1, 8)
    activation = config.sentence_transformers["activation_fn"]
    assert activation == "torch.nn.modules.activation.Sigmoid"
    names = json.loads((mini / "special_tokens_map.json").read_text("utf-8"))
    assert names["pad_token"] == "[PAD]"
    front = metadata_load(mini / "README.md") or {}
    assert front["pipeline_tag"] == "text-ranking"
    assert (front["license"], front["language"]) == ("apache-2.0", "en")
    assert "base_model" not in front  # its checkpoint is on no hub
    assert {"onnx", "transformers.js", "cross-encoder"} <= set(front["tags"])


def test_code_of_the_card(mini: Path) -> None:
    text = (mini / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        ast.parse(block)
    (alone,) = (block for block in blocks if "InferenceSession" in block)
    names: dict[str, Any] = {"query": QUERY, "documents": SHORT[:9]}
    exec(alone.replace("FOLDER", str(mini)), names)
    expected = run_onnx(mini, "onnx/model_quantized.onnx", SHORT[:9])
    np.testing.assert_allclose(names["logits"][:, 0], expected, atol=1e-5)
    manifest = locate("mini").manifest
    assert manifest.source.fingerprint in text
    assert f"{manifest.variants['onnx-int8'].fidelity.kendall:.4f}" in text


# Every family


def stand_in(checkpoint_folder: Path, folder: Path) -> Bundle:
    """A bundle of a checkpoint whose only graph is a stand-in: quick to make."""
    checkpoint = read_checkpoint(str(checkpoint_folder))
    (folder / "onnx-fp32").mkdir(parents=True)
    (folder / "onnx-fp32/model.onnx").write_bytes(b"graph")
    content = json.dumps(checkpoint.text_tokenizer())
    (folder / TOKENIZER).write_text(content, "utf-8")
    files = {"onnx-fp32/model.onnx": FileRecord.of(folder / "onnx-fp32/model.onnx")}
    variant = Variant("onnx", "fp32", files, Fidelity(0.0, 1.0, 1.0, 1.0), {"torch": "2"})
    manifest = Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        source=checkpoint.source,
        files={TOKENIZER: FileRecord.of(folder / TOKENIZER)},
        probes=Probes(Sequences([np.ones(3, np.int32)] * 32), np.zeros(32, np.float32), "none"),
        variants={variant.name: variant},
        description=checkpoint.description(),
    )
    manifest.save(folder)
    return Bundle.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer(kind: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of(kind)
    if kind in tiny_encoders.FAMILIES:
        pytest.skip("the family differs in the head alone")
    bundle = stand_in(source, tmp_path / "bundle")
    folder = tmp_path / "exported"
    export(bundle, folder)
    family = bundle.manifest.family
    ours = PairTokenizer(bundle.tokenizer, family)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    own = config["model_type"] in OWN_CLASSES
    assert own == (config["model_type"] not in CONFIG_MAPPING_NAMES)
    # One that reads config.json, too.
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.model_max_length == family.max_length
    assert loaded.pad_token_id == config["pad_token_id"] == theirs.padding["pad_id"]
    short = [text for text in TEXTS if len(ours.ids([text])[0]) < family.max_length // 3]
    pairs = [(short[-i % len(short)], text) for i, text in enumerate(TEXTS)]
    assert any(len(ours.ids([text])[0]) > family.max_length for text in TEXTS)
    for query, text in pairs:
        ids, types = ours.whole(query, text)
        pair = theirs.encode(query, text)
        assert pair.ids == ids.tolist(), (query, text)
        (batch,) = (loaded([query], [text], truncation=True),)
        assert batch["input_ids"] == [ids.tolist()], (query, text)
        if types is None:
            assert "token_type_ids" not in batch
        else:
            assert pair.type_ids == types.tolist() == batch["token_type_ids"][0]


# Formats


@pytest.fixture(scope="module")
def every(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny BERT in every variant that has a place in the layout."""
    folder = tmp_path_factory.mktemp("export") / "every"
    export(locate(bundle), folder)
    return folder


def test_every_variant_scores_the_same_elsewhere(bundle: Path, every: Path) -> None:
    texts = [*SHORT[:40], "the red planet " * 400]
    places = {n: p for n, p in NAMES.items() if n in locate(bundle).manifest.variants}
    assert {p for p in contents(every) if p.endswith((".onnx", ".xml"))} == set(places.values())
    for variant, place in places.items():
        dtype = "fp32" if place.endswith(".xml") else None
        with Reranker(bundle, backend=variant, compute_dtype=dtype) as reranker:
            ours = reranker.score([(QUERY, text) for text in texts], raw=True)
        run = run_openvino if place.endswith(".xml") else run_onnx
        atol = 1e-4
        if place.endswith(".xml"):
            # With VNNI, OpenVINO rounds activations in groups; qrank's are of another size.
            atol = tolerance(*variant.split("-", 1)).share * float(np.ptp(ours))
        np.testing.assert_allclose(run(every, place, texts), ours, atol=atol, err_msg=variant)


def test_weights_beside_the_graph(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = copy / "onnx-fp32/model.onnx"
    expected = run_onnx_alone(graph)
    monkeypatch.setattr(graph_file, "_LARGEST_PROTO", 1000)
    save_graph(load_graph(graph), graph)
    names = ("onnx-fp32/model.onnx", "onnx-fp32/model.onnx.data")
    files = {name: FileRecord.of(copy / name) for name in names}
    manifest = Manifest.load(copy)
    manifest = manifest.with_variant(replace(manifest.variants["onnx-fp32"], files=files))
    export(Bundle(copy, manifest), tmp_path / "big", ["onnx-fp32"])
    assert (tmp_path / "big/onnx/model.onnx_data").stat().st_size > 10_000
    np.testing.assert_array_equal(run_onnx_alone(tmp_path / "big/onnx/model.onnx"), expected)


def test_graphs_that_onnxruntime_quantized(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx-fp32/model.onnx")
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "plain.onnx")
    theirs = tmp_path / "theirs.onnx"
    quantize_dynamic(tmp_path / "plain.onnx", theirs, weight_type=QuantType.QInt8)
    write_graph(theirs, tmp_path / "exported.onnx", quantized=True)
    exact = run_onnx_alone(theirs, exact=True)
    np.testing.assert_allclose(run_onnx_alone(tmp_path / "exported.onnx"), exact, atol=1e-5)


def run_onnx_alone(graph: Path, *, exact: bool = False) -> NDArray[np.float32]:
    """Logits of a tiny BERT's graph on random tokens; `exact`: with onnxruntime's safe setting."""
    settings = onnxruntime.SessionOptions()
    if exact:
        settings.add_session_config_entry("session.x64quantprecision", "1")
    ids = np.random.default_rng(1).integers(5, 1000, (4, 90))
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    (found,) = onnxruntime.InferenceSession(str(graph), settings).run(["logits"], inputs)
    logits: NDArray[np.float32] = found
    return logits


# Refusals


def changed(bundle: Path, **family: Any) -> Bundle:
    found = locate(bundle)
    return Bundle(
        found.folder,
        replace(found.manifest, family=replace(found.manifest.family, **family)),
    )


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            {"pooling": "last"},
            r"a prompt at its last token, which no program .* serve it with qrank",
        ),
        ({"pooling": "step"}, "inside a prompt"),
        ({"template": (2, "q: {query}", 3, "{document}", 3)}, "inside a prompt"),
        ({"temperature": 5.0}, "divides its logits by 5"),
    ],
)
def test_models_that_no_other_program_can_score(
    family: dict[str, Any], reason: str, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=reason):
        export(changed(bundle, **family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bundles_of_an_earlier_qrank(bundle: Path, tmp_path: Path) -> None:
    found = locate(bundle)
    older = Bundle(found.folder, replace(found.manifest, description=None))
    with pytest.raises(ConversionError, match="convert the model again, with --force"):
        export(older, tmp_path / "out")


def test_tokenizers_without_padding(bundle: Path, tmp_path: Path) -> None:
    found = locate(bundle)
    assert found.manifest.description is not None
    description = replace(found.manifest.description, special={"cls": "[CLS]"})
    odd = Bundle(found.folder, replace(found.manifest, description=description))
    with pytest.raises(ConversionError, match="names no pad_token"):
        export(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_variants(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = locate(bundle)
    with pytest.raises(InputError, match="no variant 'onnx-int3'; it has: onnx-int8"):
        export(found, tmp_path / "out", ["onnx-int3"])
    with pytest.raises(
        ConversionError, match=r"gguf-q8_0/model\.gguf in the bundle, is what llama"
    ):
        export(found, tmp_path / "out", ["onnx", "gguf-q8_0"])
    assert not (tmp_path / "out").exists()
    export(found, tmp_path / "out", ["openvino-fp16", "onnx-fp16"], card=False)
    assert not caplog.messages
    assert set(contents(tmp_path / "out")) == {
        "config.json",
        "onnx/model_fp16.onnx",
        "openvino/openvino_model_fp16.bin",
        "openvino/openvino_model_fp16.xml",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# The folder


def test_a_folder_that_holds_something(bundle: Path, tmp_path: Path) -> None:
    found, folder = locate(bundle), tmp_path / "out"
    export(found, folder, ["onnx-fp32"])
    (folder / ".gitattributes").write_text("*.onnx filter=lfs")
    (folder / "onnx/mine.txt").write_text("kept")
    before = contents(folder)
    with pytest.raises(ConversionError, match="is not empty"):
        export(found, folder, ["openvino-int8"])
    assert contents(folder) == before
    export(found, folder, ["openvino-int8"], force=True)
    after = contents(folder)
    assert "onnx/model.onnx" not in after  # it may be of another model
    assert after["onnx/mine.txt"] == b"kept"
    assert ".gitattributes" in after
    assert "openvino/openvino_model_qint8_quantized.bin" in after


def test_files_that_no_export_wrote(
    bundle: Path, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "checkpoint"))
    before = contents(folder)
    with pytest.raises(ConversionError, match=r"holds config\.json, which no export wrote"):
        export(locate(bundle), folder, ["onnx-fp32"], force=True)
    assert contents(folder) == before


@pytest.mark.parametrize("force", [False, True])
def test_written_as_a_whole_or_not_at_all(
    force: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = locate(bundle), tmp_path / "out"
    if force:
        export(found, folder, ["onnx-fp32"])
    before = contents(folder) if force else {}
    moved = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if path.name == "special_tokens_map.json" and "new" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        return moved(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ConversionError, match="is full"):
        export(found, folder, ["onnx-fp16"], force=force)
    assert folder.exists() == force
    assert (contents(folder) if force else {}) == before


def test_never_into_a_bundle_or_through_a_link(copy: Path, bundle: Path, tmp_path: Path) -> None:
    found = locate(bundle)
    for folder in (copy, bundle / "inside"):
        with pytest.raises(ConversionError, match="is a bundle or lies in one"):
            export(found, folder, force=True)
    export(found, tmp_path / "out", ["onnx-fp32"])
    shutil.move(tmp_path / "out/onnx", tmp_path / "elsewhere")
    (tmp_path / "out/onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match="nothing behind a link"):
        export(found, tmp_path / "out", force=True)
    assert (tmp_path / "elsewhere/model.onnx").exists()


# What a conversion keeps for it


def test_licence_and_origin(
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "tiny"))
    card = "---\nlicense: mit\nlanguage: [en, de]\nbase_model: other/one\n---\n# Tiny\n"
    (source / "README.md").write_text(card, "utf-8")
    bundle = stand_in(source, tmp_path / "bundle")
    on_hub = replace(bundle.manifest.source, id="owner/tiny", revision="abc")
    export(Bundle(bundle.folder, replace(bundle.manifest, source=on_hub)), tmp_path / "out")
    front = metadata_load(tmp_path / "out/README.md") or {}
    assert (front["license"], front["language"]) == ("mit", ["en", "de"])
    assert (front["base_model"], front["base_model_relation"]) == ("owner/tiny", "quantized")
    assert "revision `abc`" in (tmp_path / "out/README.md").read_text("utf-8")
    (source / "README.md").write_text("---\nlicense: [mit\n---\n", "utf-8")
    assert stand_in(source, tmp_path / "other").manifest.description is not None
    assert "front matter cannot be read" in caplog.text


def test_code_of_a_checkpoint_is_not_exported(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "tiny"))
    tiny.edit_config(source, auto_map={"AutoConfig": "evil.Config"})
    export(stand_in(source, tmp_path / "bundle"), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text("utf-8"))
