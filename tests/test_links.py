"""Models behind symbolic links, as in caches and on large disks, work like any other."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import prebuilt_files
import pytest

from qrank import Reranker
from qrank.bundle.locate import place
from qrank.converters import graph_file
from qrank.converters.convert import convert
from qrank.converters.graph_file import load_graph
from qrank.errors import ConversionError

PAIRS = [("which planet is red?", "Mars is."), ("bread?", "Yeast ferments sugar in the dough.")]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def linked(folder: Path, blobs: Path) -> Path:
    """Move every file of a folder elsewhere, under another name, and leave a link in its place."""
    blobs.mkdir(parents=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for number, path in enumerate(files):
        path.rename(blobs / f"blob{number}")
        path.symlink_to(blobs / f"blob{number}")
    return folder


def beside(graph: Path) -> None:
    """Move a graph's weights to a file next to it."""
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights.bin")


def theirs(bert: str, bundle: Path, folder: Path, variant: str) -> Path:
    """A repository with a prebuilt file, behind links."""
    prebuilt_files.describe(Path(bert), folder)
    if variant == "onnx-fp32":
        shutil.copytree(bundle / variant, folder / "onnx")
        beside(folder / "onnx" / "model.onnx")
    else:
        shutil.copytree(bundle / variant, folder, dirs_exist_ok=True)
    return linked(folder, folder.parent / "blobs")


@pytest.mark.parametrize("variant", ["onnx-fp32", "openvino-fp16", "gguf-f16"])
def test_prebuilt_files_behind_links_are_taken(
    variant: str, bundle: Path, bert: str, tmp_path: Path
) -> None:
    source = theirs(bert, bundle, tmp_path / "theirs", variant)
    (tmp_path / "link").symlink_to(source)
    made = convert(str(tmp_path / "link"), None, tmp_path / "out")
    assert list(made.manifest.variants) == [variant]
    assert made.manifest.name == "theirs"
    assert not any(path.is_symlink() for path in made.folder.rglob("*"))
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "blobs")
    with Reranker(made.folder) as ours, Reranker(bundle, backend=variant) as known:
        np.testing.assert_allclose(ours.score(PAIRS), known.score(PAIRS), atol=1e-3)


def test_a_link_to_one_file_leads_to_what_stands_beside_it(
    bundle: Path, bert: str, tmp_path: Path
) -> None:
    source = prebuilt_files.describe(Path(bert), tmp_path / "theirs")
    shutil.copytree(bundle / "onnx-fp32", source / "onnx")
    beside(source / "onnx" / "model.onnx")
    (tmp_path / "here.onnx").symlink_to(source / "onnx" / "model.onnx")
    made = convert(str(tmp_path / "here.onnx"), None, tmp_path / "out")
    assert list(made.manifest.variants) == ["onnx-fp32"]


def test_a_folder_of_the_hubs_cache_is_the_hubs(bundle: Path, bert: str, tmp_path: Path) -> None:
    home = tmp_path / "hub" / "models--they--their-model"
    snapshot = home / "snapshots" / COMMIT
    theirs(bert, bundle, snapshot, "onnx-fp32")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT, "utf-8")
    for number, source in enumerate((home, snapshot, snapshot / "onnx" / "model.onnx")):
        made = convert(str(source), None, tmp_path / f"out-{number}").manifest
        assert (made.source.id, made.source.revision) == ("they/their-model", COMMIT)
        assert made.name == "their-model"
    assert place(home) == snapshot


@pytest.mark.usefixtures("ready_graph")
def test_a_checkpoint_and_a_bundle_behind_links_are_taken(
    without_fp32: Path, bert: str, tmp_path: Path
) -> None:
    source = linked(Path(shutil.copytree(bert, tmp_path / "mine" / "tiny")), tmp_path / "blobs")
    (tmp_path / "link").symlink_to(source)
    made = convert(str(tmp_path / "link"), [("onnx", "fp32")], without_fp32)
    assert "onnx-fp32" in made.manifest.variants
    folder = linked(without_fp32, tmp_path / "more")
    with Reranker(folder, backend="onnx-fp32") as reranker:
        assert len(reranker.score(PAIRS)) == 2


def test_a_large_bundle_runs_from_the_hubs_cache(
    bundle: Path, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are in a file next to the graph, both behind links."""
    monkeypatch.setattr(graph_file, "_LARGEST_PROTO", 0)
    source = prebuilt_files.describe(Path(bert), tmp_path / "theirs")
    shutil.copy(bundle / "onnx-fp32" / "model.onnx", source)
    made = convert(str(source), None, tmp_path / "hub" / "snapshots" / COMMIT)
    assert (made.folder / "onnx-fp32" / "model.onnx.data").is_file()
    linked(made.folder, tmp_path / "hub" / "blobs")
    with Reranker(made.folder) as reranker:
        assert len(reranker.score(PAIRS)) == 2


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../weights.bin", "a file below its own folder was expected"),
        ("/etc/passwd", "a file below its own folder was expected"),
        ("nothing.bin", "there is no .*nothing.bin"),
        ("short.bin", r"short\.bin is cut off: .* has 3 bytes there of "),
    ],
)
def test_weights_that_are_not_beside_the_graph_are_refused(
    location: str, message: str, bundle: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "model.onnx"
    shutil.copy(bundle / "onnx-fp32" / "model.onnx", graph)
    beside(graph)
    shutil.copy(tmp_path / "weights.bin", tmp_path.parent / "weights.bin")
    (tmp_path / "short.bin").write_bytes(b"abc")
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            if entry.key == "offset":
                entry.value = "0"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(ConversionError, match=message):
        load_graph(graph)


def test_weights_within_nodes_and_subgraphs_are_read_too(tmp_path: Path) -> None:
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    numbers = np.arange(600, dtype=np.float32)
    value = helper.make_tensor_value_info("y", floats, [600])

    def constant(name: str) -> onnx.NodeProto:
        return helper.make_node(
            "Constant", [], [name], value=onnx.numpy_helper.from_array(numbers, name)
        )

    branches = [helper.make_graph([constant("y")], "branch", [], [value]) for _ in range(2)]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    model = helper.make_model(helper.make_graph([node], "graph", [condition], [value]))
    options = {"save_as_external_data": True, "location": "w", "convert_attribute": True}
    onnx.save(model, tmp_path / "model.onnx", **options)
    assert (tmp_path / "w").stat().st_size >= numbers.nbytes
    (tmp_path / "w").rename(tmp_path / "elsewhere")
    (tmp_path / "w").symlink_to(tmp_path / "elsewhere")
    for attribute in load_graph(tmp_path / "model.onnx").graph.node[0].attribute:
        (inner,) = attribute.g.node
        found = onnx.numpy_helper.to_array(inner.attribute[0].t)
        np.testing.assert_array_equal(found, numbers)
