"""Checkpoints on the hub that are converted on first use, and the bundles that come of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import qrank_
from conftest import contents, subset
from hub_server import Hub, use_hub
from judged import Data
from test_surroundings import python

from qrank import Reranker, tune
from qrank.bundle import converted
from qrank.bundle.hub_names import parse
from qrank.bundle.locate import find, locate
from qrank.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from qrank.converters.onnx import export as onnx_converter
from qrank.errors import (
    BundleError,
    ConversionError,
    FamilyError,
    FidelityError,
    InputError,
    MissingExtraError,
    ModelNotFoundError,
    TargetError,
)
from qrank.select.obtain import Wanted, obtain
from qrank.select.targets import convertible
from qrank.system.extras import installed

MODEL = "they/their-model"
DOCUMENTS = ["mars is red", "bread is baked", "the sky is blue"]


@pytest.fixture
def onnx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where onnx is the only format whose packages are installed."""
    missing = ("openvino", "nncf", "gguf", "llama_cpp", "mlx.core")
    monkeypatch.setattr(
        "qrank.converters.makers.installed", lambda name: name not in missing and installed(name)
    )


@pytest.fixture
def hub(server: Hub, bert: str, onnx_alone: None, ready_graph: Callable[[Path], None]) -> Hub:
    """A hub with tiny BERT, whose conversion is fast."""
    server.push(MODEL, Path(bert))
    return server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder, which need not exist."""
    return tmp_path / "data"


@pytest.fixture
def ours(hub: Hub, bundle: Path, data: Path) -> Path:
    """The bundle of MODEL, as a conversion leaves it in the data folder."""
    folder = data / "bundles" / "they--their-model"
    shutil.copytree(bundle / "onnx-int8", folder / "onnx-int8")
    shutil.copy(bundle / TOKENIZER, folder)
    manifest = Manifest.load(bundle)
    source = replace(manifest.source, id=MODEL, revision=hub.commit(MODEL, "main"))
    kept = {"onnx-int8": manifest.variants["onnx-int8"]}
    replace(manifest, source=source, variants=kept).save(folder)
    return folder


def variants(folder: Path) -> list[str]:
    return list(Manifest.load(folder).variants)


# From nothing to a ranking


def test_a_checkpoint_is_converted_once(
    hub: Hub,
    bert: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    commit = hub.commit(MODEL, "main")
    with Reranker(MODEL) as reranker:
        first = [(item.index, item.score) for item in reranker.rank("red", DOCUMENTS)]
        assert reranker.target.name == "onnx-int8@cpu"
    folder = data / "bundles" / "they--their-model"
    source = Manifest.load(folder).source
    assert (source.id, source.revision) == (MODEL, commit)
    lines = [record.getMessage() for record in caplog.records if record.name == "qrank"]
    assert f"{MODEL} is a checkpoint: converting it to onnx-int8, once" in lines
    made = next(line for line in lines if line.startswith("made onnx-int8 in "))
    assert made.endswith(f", in {folder}")
    assert capfd.readouterr() == ("", "")
    # The hub is not asked again, whether it can be reached or not; nothing is converted.
    requests, before = hub.requests, contents(data)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    use_hub("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("qrank.converters.convert.read", None)
    caplog.clear()
    for again in (Reranker(MODEL), Reranker(f"{MODEL}@main"), Reranker(MODEL, convert=False)):
        with again, pickle.loads(pickle.dumps(again)) as pickled:
            found = [(item.index, item.score) for item in pickled.rank("red", DOCUMENTS)]
            assert found == first
    assert locate(MODEL).folder == folder
    assert (hub.requests, contents(data)) == (requests, before)
    assert not [record for record in caplog.records if record.name == "qrank"]


def test_the_commands_work_from_a_hub_id(hub: Hub, data: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\n".join(DOCUMENTS), "utf-8")
    command = ("score", "-m", MODEL, "-q", "red", tmp_path / "d.txt")
    first = qrank_(*command)
    assert first.exit_code == 0, first.output
    assert len(first.stdout.splitlines()) == 3
    start, end = first.stderr.splitlines()
    assert start == f"qrank: {MODEL} is a checkpoint: converting it to onnx-int8, once"
    assert end.startswith("qrank: made onnx-int8 in ")
    assert end.endswith(f", in {data / 'bundles' / 'they--their-model'}")
    again = qrank_(*command)
    assert (again.stdout, again.stderr) == (first.stdout, "")


@pytest.mark.parametrize(
    "command",
    [
        ("score", "-q", "red", "-m", MODEL),
        ("serve", "--port", "0", MODEL),
        ("tune", MODEL),
        ("bench", MODEL),
        ("eval", "--data", "judged", MODEL),
        ("calibrate", "--data", "judged", MODEL),
    ],
)
@pytest.mark.parametrize("revision", [(), ("--revision", "v1")])
def test_without_the_converters_there_is_one_line(
    command: tuple[str, ...],
    revision: tuple[str, ...],
    server: Hub,
    bert: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "judged").mkdir()
    Data().write(tmp_path / "judged")
    monkeypatch.chdir(tmp_path)
    server.push(MODEL, Path(bert), "v1")
    monkeypatch.setattr(
        "qrank.converters.makers.installed", lambda name: name != "transformers" and installed(name)
    )
    refused = qrank_(*command, *revision, stdin="mars\n")
    assert refused.exit_code == MissingExtraError.exit_code, refused.output
    name = f"{MODEL}@v1" if revision else MODEL
    assert refused.stderr.splitlines()[-1] == (
        f"qrank: error: {name} is a checkpoint, and packages are missing to convert it to "
        'openvino or onnx or gguf or mlx; install them with: pip install "qrank[convert]"'
    )
    assert server.asked == [TOKENIZER]
    assert not data.exists()


def test_a_conversion_can_be_forbidden(hub: Hub, data: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=rf"{MODEL} on the hub is no bundle; convert it"):
        Reranker(MODEL, convert=False)
    with pytest.raises(InputError, match="convert is 1; give True or False"):
        Reranker(MODEL, convert=1)  # type: ignore[arg-type]
    assert hub.asked == [TOKENIZER]
    assert not data.exists()


def test_an_inspection_converts_nothing(hub: Hub, data: Path) -> None:
    assert qrank_("inspect", MODEL).exit_code == ModelNotFoundError.exit_code
    assert not data.exists()
    Reranker(MODEL).close()
    shown = qrank_("inspect", MODEL, "--verify")
    assert f"{MODEL} at {hub.commit(MODEL, 'main')}" in shown.stdout


# Which variant


def test_the_expected_fastest_comes_first() -> None:
    assert convertible(None, None)[:2] == [("openvino", "int8"), ("onnx", "int8")]
    assert convertible("openvino", None)[0] == ("openvino", "int8")
    assert convertible("openvino-int8-w8a8", None) == [("openvino", "int8-w8a8")]
    assert convertible("onnx", "cuda")[0] == ("onnx", "fp16")
    assert {name for name, _ in convertible(None, "metal")} == {"gguf", "mlx"}
    assert convertible("fakes:length", None) == convertible(None, None)
    with pytest.raises(TargetError, match="no checkpoint can be converted for backend 'onx'"):
        convertible("onx", None)
    with pytest.raises(TargetError, match="no device 'tpu' for a converted model"):
        convertible(None, "tpu")


def test_another_packages_backend_gets_a_format_that_it_reads(
    plug_in: Callable[..., None],
) -> None:
    plug_in(other="doubles:RIGHT")
    assert convertible("other", None)[0] == ("onnx", "int8")
    assert convertible("other/onnx-fp32", None) == [("onnx", "fp32")]


def test_a_named_variant_is_added_to_what_is_there(hub: Hub, bert: str, data: Path) -> None:
    Reranker(MODEL).close()
    folder = data / "bundles" / "they--their-model"
    # The branch moves on; the bundle stays what it is.
    first = hub.commit(MODEL, "main")
    other = Path(shutil.copytree(bert, data / "other"))
    (other / "README.md").write_text("new", "utf-8")
    assert hub.push(MODEL, other) != first
    with Reranker(MODEL, backend="onnx-fp32") as reranker:
        assert reranker.target.name == "onnx-fp32@cpu"
    assert variants(folder) == ["onnx-int8", "onnx-fp32"]
    assert Manifest.load(folder).source.revision == first
    requests = hub.requests
    Reranker(MODEL, backend="onnx").close()
    Reranker(MODEL, backend="onnx-fp32").close()
    with pytest.raises(TargetError, match="has no variant for backend 'onnx-fp16'; it has: onnx"):
        Reranker(MODEL, backend="onnx-fp16", convert=False)
    with pytest.raises(TargetError, match="has no variant for backend 'onnx-fp16'; it has: onnx"):
        Reranker(folder, backend="onnx-fp16")
    assert hub.requests == requests
    bundle = obtain(MODEL, Wanted(["onnx-fp16", "onnx-fp32", "onnx"]))
    assert list(bundle.manifest.variants) == ["onnx-int8", "onnx-fp32", "onnx-fp16"]


def test_a_refused_variant_makes_way_for_the_next(
    hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready = onnx_converter.convert
    tried = []

    def convert(checkpoint: object, precision: str, *rest: object) -> str:
        tried.append(precision)
        if precision == "int8":
            raise FidelityError("it ranks otherwise")
        return ready(checkpoint, precision, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_converter, "convert", convert)
    with Reranker(MODEL) as reranker:
        assert reranker.target.name == "onnx-fp32@cpu"
    assert tried == ["int8", "fp32"]
    assert "onnx-int8 was not made: it ranks otherwise" in caplog.text
    assert variants(data / "bundles" / "they--their-model") == ["onnx-fp32"]
    with pytest.raises(FidelityError, match="it ranks otherwise"):
        Reranker(MODEL, backend="onnx-int8")
    assert variants(data / "bundles" / "they--their-model") == ["onnx-fp32"]


def test_a_family_is_named_where_a_checkpoint_does_not_say(
    server: Hub, checkpoint_of: Callable[[str], Path], data: Path, onnx_alone: None
) -> None:
    server.push("they/chat", checkpoint_of("qwen3"))
    with pytest.raises(FamilyError, match="say which with --family"):
        Reranker("they/chat")
    assert "model.safetensors" not in server.asked
    assert not data.exists()
    with pytest.raises(FamilyError, match="no family 'qwen4'"):
        Reranker("they/chat", family="qwen4")


def test_a_bundle_has_its_own_family(ours: Path) -> None:
    Reranker(MODEL, family="bert").close()
    with pytest.raises(InputError, match=r"family is 'roberta', and .* a bundle of family bert"):
        Reranker(MODEL, family="roberta")


# Revisions


def test_each_revision_has_its_own_bundle(hub: Hub, bert: str, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(bert, tmp_path / "newer"))
    (newer / "README.md").write_text("new", "utf-8")
    second = hub.push(MODEL, newer, "v2", "fix/one")
    names = [MODEL, f"{MODEL}@v2", f"{MODEL}@fix/one", f"{MODEL}@{second}"]
    Reranker(MODEL).close()
    Reranker(f"{MODEL}@v2").close()
    Reranker(MODEL, revision="fix/one").close()
    obtain(MODEL, revision=second)
    assert sorted(converted.converted()) == sorted(names)
    for revision in (None, "v2", "fix/one", second):
        assert locate(MODEL, revision=revision).manifest.source.revision == second
    requests = hub.requests
    Reranker(f"{MODEL}@v2", revision="v2").close()
    assert hub.requests == requests
    with pytest.raises(InputError, match="with revision v2 and with v3: name one"):
        Reranker(f"{MODEL}@v2", revision="v3")
    with pytest.raises(ModelNotFoundError, match="has no revision v9"):
        Reranker(MODEL, revision="v9")


def test_a_revision_is_for_hub_ids(bundle: Path) -> None:
    for model in (bundle, str(bundle)):
        with pytest.raises(ModelNotFoundError, match="a revision is for hub ids"):
            Reranker(model, revision="v1")
    with pytest.raises(ModelNotFoundError, match="mini comes with qrank; a revision is for hub"):
        tune(revision="v1")
    with pytest.raises(InputError, match="is a Bundle; a revision is for hub ids"):
        Reranker(locate(bundle), revision="v1")
    with pytest.raises(InputError, match="revision is 1; give a string, or None"):
        Reranker(bundle, revision=1)  # type: ignore[arg-type]
    refused = qrank_("serve", "--revision", "v1", "mini", "o/n")
    assert "--revision goes with one MODEL; or write owner/name@REVISION" in refused.stderr


def test_torch_runs_a_revision_as_it_is(hub: Hub, data: Path) -> None:
    commit = hub.commit(MODEL, "main")
    hub.refs[MODEL]["v1"] = str(commit)
    with Reranker(MODEL, revision="v1", backend="torch") as reranker:
        assert reranker.engine.manifest.source.revision == commit
    assert not data.exists()
    with pytest.raises(ModelNotFoundError, match="has no revision v9"):
        Reranker(MODEL, revision="v9", backend="torch")


@pytest.mark.parametrize("text", ["o/n", "o/n@v1.0", "big.owner/n_a-me.2@refs%2Fpr%2F1", "o/n@ä"])
def test_a_folder_tells_its_name(text: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRANK_DATA", str(data))
    name = parse(text)
    assert name is not None
    folder = converted.place_of(name)
    assert converted.name_of(folder) == text
    assert folder.parent == data / "bundles"
    assert converted.name_of(data / folder.name) is None
    assert converted.name_of(data / "bundles" / "other") is None


# What goes wrong


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "accepted its licence: do so at {url}/they/their-model"),
        (401, "RepoNotFound", "none of that name, or a private one: look at {url}/they/their-mod"),
        (403, "", "see whether your token may read it"),
    ],
)
def test_a_refusal_of_the_hub_leaves_nothing(
    status: int, code: str, message: str, hub: Hub, data: Path
) -> None:
    hub.refused[MODEL] = (status, code)
    with pytest.raises(ModelNotFoundError) as refused:
        Reranker(MODEL)
    assert message.format(url=hub.url) in str(refused.value)
    with pytest.raises(ModelNotFoundError, match="the hub has none of that name"):
        Reranker("they/nothing")
    assert not data.exists()


def test_offline_needs_what_was_downloaded(
    hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE keeps qrank from asking the hub"):
        Reranker(MODEL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError, match="convert it first"):
        Reranker(MODEL, convert=False)  # downloads a part
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE keeps qrank from asking the hub"):
        Reranker(MODEL)
    assert not data.exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Reranker(MODEL, backend="torch").close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Reranker(MODEL).close()
    assert list(converted.converted()) == [MODEL]


def test_a_cut_download_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts["model.safetensors"] = 5_500
    Reranker(MODEL).close()
    asked = [r for name, r in zip(hub.asked, hub.ranges, strict=True) if "safetensors" in name]
    assert asked == ["", "bytes=5000-"]


def test_an_unknown_architecture_leaves_nothing(
    server: Hub, bert: str, data: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(bert, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text("utf-8"))
    (odd / "config.json").write_text(json.dumps({**config, "architectures": ["OddModel"]}))
    server.push(MODEL, odd)
    with pytest.raises(FamilyError, match="names the architecture OddModel"):
        Reranker(MODEL)
    assert "config.json" in server.asked
    assert "model.safetensors" not in server.asked, "it is refused before the weights"
    assert not data.exists()


def test_damaged_weights_leave_nothing(hub: Hub, bert: str, data: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(bert, tmp_path / "odd"))
    (odd / "model.safetensors").write_bytes(b"no weights")
    hub.push(MODEL, odd)
    with pytest.raises(ConversionError, match="safetensors cannot read"):
        Reranker(MODEL)
    assert not data.exists()


def test_a_data_folder_that_cannot_be_written_is_told(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRANK_DATA", "/dev/null/data")
    with pytest.raises(
        ConversionError, match=r"/dev/null/data/bundles cannot be .* set QRANK_DATA"
    ):
        Reranker(MODEL)
    assert "model.safetensors" not in hub.asked


def test_a_damaged_bundle_says_how_to_make_it_again(ours: Path) -> None:
    (ours / "onnx-int8" / "model.onnx").write_bytes(b"short")
    advice = rf"remove it \(qrank models --remove {MODEL}\); the next use converts it again"
    with pytest.raises(BundleError, match=advice):
        Reranker(MODEL)
    (ours / MANIFEST).write_text("{}", "utf-8")
    with pytest.raises(BundleError, match=advice):
        Reranker(MODEL)
    assert f"  {MODEL} " in qrank_("models").stdout
    assert "damaged: " in qrank_("models").stdout
    assert qrank_("models", "--remove", MODEL).exit_code == 0
    Reranker(MODEL).close()


def test_a_file_of_the_hub_that_is_not_the_manifests_is_refused(server: Hub, copy: Path) -> None:
    graph = copy / "onnx-int8" / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    commit = server.push("they/their-bundle", copy)
    with pytest.raises(BundleError, match="is damaged: its sha256 is") as refused:
        Reranker("they/their-bundle", backend="onnx-int8")
    name = f"they/their-bundle@{commit}"
    assert f"remove it (qrank models --remove {name}); the next" in str(refused.value)
    graph.write_bytes(content)
    server.push("they/their-bundle", copy)
    assert qrank_("models", "--remove", name).exit_code == 0
    Reranker("they/their-bundle", backend="onnx-int8").close()


# qrank models


def test_models_are_listed_and_removed(
    hub: Hub, ours: Path, bundle: Path, data: Path, tmp_path: Path
) -> None:
    theirs = "they/their-bundle"
    old = hub.push(theirs, subset(bundle, tmp_path / "old", ["onnx-int8"]), "v1")
    hub.push(theirs, subset(bundle, tmp_path / "new", ["onnx-int8", "onnx-fp16"]))
    commit = str(hub.commit(MODEL, "main"))
    shutil.copytree(ours, ours.with_name(f"{ours.name}@{commit}"))
    for name in (MODEL, f"{MODEL}@{commit}", theirs, f"{theirs}@v1"):
        Reranker(name).close()
    Reranker(MODEL, backend="torch").close()  # downloads the checkpoint
    listed = qrank_("models")
    assert listed.exit_code == 0, listed.output
    lines = [" ".join(line.split()) for line in listed.stdout.splitlines()]
    at = lines.index(f"Converted on this machine, in {data / 'bundles'}")
    assert lines[at + 1].startswith(f"{MODEL} onnx-int8 0.")
    assert lines[at + 1].endswith(f" MB bert, of {commit[:8]}")
    assert lines[at + 2].startswith(f"{MODEL}@{commit} onnx-int8")
    at = lines.index(f"Downloaded from the hub, in {tmp_path / 'cache'}")
    assert lines[at + 1].startswith(f"{theirs} onnx-int8 0.")
    assert lines[at + 2] == "onnx-fp16 on the hub bert"
    assert lines[at + 3].startswith(f"{theirs}@v1 onnx-int8 0.")
    assert lines[at + 4] == "Families"

    gone = qrank_("models", "--remove", MODEL, "--remove", f"{theirs}@v1")
    assert (gone.exit_code, gone.stdout) == (0, f"removed {MODEL}\nremoved {theirs}@v1\n")
    assert f"to remove it: hf cache rm model/{MODEL}" in gone.stderr
    assert sorted(path.name for path in (data / "bundles").iterdir()) == [
        f"they--their-model@{commit}"
    ]
    snapshots = tmp_path / "cache" / "models--they--their-bundle" / "snapshots"
    assert not (snapshots / old).exists()
    shown = qrank_("models").stdout
    assert f"  {MODEL} " not in shown
    assert f"  {theirs} " in shown

    again = qrank_("models", "--remove", MODEL)
    assert again.exit_code == ModelNotFoundError.exit_code
    assert f"there is no bundle {MODEL} to remove; qrank models lists them" in again.stderr
    assert "mini comes with qrank" in qrank_("models", "--remove", "mini").stderr


def test_what_a_killed_removal_left_is_cleared(ours: Path) -> None:
    left = ours.parent / ".removed" / "they--other"
    left.mkdir(parents=True)
    assert list(converted.converted()) == [MODEL]
    assert qrank_("models", "--remove", MODEL).exit_code == 0
    assert list(ours.parent.iterdir()) == []


# Real processes


CODE = """
import shutil, sys
from qrank.converters.onnx import export
from qrank.cli import main
graph, rest = sys.argv[1], sys.argv[2:]
export.convert = lambda checkpoint, precision, folder, pairs: shutil.copy(graph, folder) and ""
main(rest)
"""


def test_two_processes_convert_at_once(
    server: Hub, bert: str, bundle: Path, data: Path, tmp_path: Path
) -> None:
    """With the variables set as a user would: nothing of the hub's client is patched here."""
    server.push(MODEL, Path(bert))
    (tmp_path / "d.txt").write_text("\n".join(DOCUMENTS), "utf-8")
    graph = bundle / "onnx-fp32" / "model.onnx"
    command = ("score", "-m", MODEL, "-q", "red", "--backend", "onnx", "-f", "json", "d.txt")
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "QRANK_DATA": str(data),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(graph), *command],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    folder = data / "bundles" / "they--their-model"
    assert sorted(path.name for path in folder.iterdir()) == ["onnx-int8", MANIFEST, TOKENIZER]
    # Offline, with the hub gone, by a third.
    done = python(
        CODE,
        "nothing",
        *command,
        folder=tmp_path,
        **{**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, outputs[0][0], "")


def test_a_folder_that_is_being_published_is_a_bundle_to_be(ours: Path) -> None:
    # As a conversion that was killed between its last file and the manifest leaves it.
    work = ours / ".qrank-work"
    (work / "new").mkdir(parents=True)
    names = [TOKENIZER, "onnx-int8/model.onnx"]
    moves = {"digest": Manifest.load(ours).digest, "new": names, "old": []}
    (work / "moves.json").write_text(json.dumps(moves), "utf-8")
    (ours / MANIFEST).unlink()
    assert find(MODEL) == parse(MODEL), "it is not a bundle yet"
    Reranker(MODEL).close()
    assert not work.exists()
    assert variants(ours) == ["onnx-int8"]
