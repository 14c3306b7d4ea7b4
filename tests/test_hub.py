"""Models on the hub: ways to name them, partial downloads, and errors."""

import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
import pytest
from click.testing import CliRunner
from conftest import subset
from hub_server import Hub, use_hub
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from hypothesis import given
from hypothesis import strategies as st

from qrank import Reranker
from qrank.bundle import hub
from qrank.bundle.hub_names import HubName, parse
from qrank.bundle.locate import locate, place
from qrank.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from qrank.cli import main
from qrank.converters.convert import convert
from qrank.errors import InputError, ModelNotFoundError

REPOSITORY = "they/their-bundle"


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("BAAI/bge-reranker-base", HubName("BAAI/bge-reranker-base")),
        ("BAAI/bge-reranker-base/", HubName("BAAI/bge-reranker-base")),
        ("o/n@v1.0", HubName("o/n", "v1.0")),
        ("o/n/tree/main", HubName("o/n", "main")),
        ("o/n/onnx/model.onnx", HubName("o/n", None, "onnx/model.onnx")),
        ("https://huggingface.co/o/n", HubName("o/n")),
        ("https://huggingface.co/o/n/tree/main?x=1#files", HubName("o/n", "main")),
        ("https://hf.co/o/n/tree/refs%2Fpr%2F1", HubName("o/n", "refs/pr/1")),
        ("huggingface.co/o/n/tree/refs/pr/1/onnx", HubName("o/n", "refs/pr/1", "onnx")),
        ("http://www.huggingface.co/o/n.git", HubName("o/n")),
        ("git@hf.co:o/n.git", HubName("o/n")),
        ("hf://o/n@dev/a.gguf", HubName("o/n", "dev", "a.gguf")),
        ("hf://models/o/n", HubName("o/n")),
        (
            "https://huggingface.co/o/n/resolve/v2/a.gguf?download=true",
            HubName("o/n", "v2", "a.gguf"),
        ),
        ("./o/n", None),
        ("../o/n", None),
        ("/o/n", None),
        ("~/o", None),
        ("reranker", None),
        ("two words/n", None),
    ],
)
def test_what_people_paste_is_understood(text: str, name: HubName | None) -> None:
    assert parse(text) == name


WORDS = st.text("abAB09._-", min_size=1, max_size=6).map(lambda word: f"x{word}y")


@given(owner=WORDS, name=WORDS, revision=WORDS, branch=WORDS)
def test_an_address_and_a_name_are_the_same(
    owner: str, name: str, revision: str, branch: str
) -> None:
    repository = f"{owner}/{name}"
    named = parse(f"{repository}@{revision}")
    assert named == HubName(repository, revision)
    assert parse(f"https://huggingface.co/{repository}/tree/{revision}") == named
    slashed = quote(f"{revision}/{branch}", safe="")
    found = parse(f"https://huggingface.co/{repository}/tree/{slashed}")
    assert found == HubName(repository, f"{revision}/{branch}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://huggingface.co/datasets/o/n", "is a dataset, and no model"),
        ("https://github.com/o/n", "an address of github.com; of addresses, qrank takes those of"),
    ],
)
def test_an_address_of_something_else_is_told(text: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        place(text)
    with pytest.raises(ModelNotFoundError, match=message):
        Reranker(text)


def test_two_revisions_are_refused() -> None:
    with pytest.raises(InputError, match="with revision v1 and with v2: name one"):
        convert("o/n@v1", revision="v2")
    with pytest.raises(InputError, match="the model's name is empty"):
        Reranker(" ")


def test_a_part_of_a_model_stands_for_it(bundle: Path, bert: str, tmp_path: Path) -> None:
    for name in (MANIFEST, TOKENIZER):
        with Reranker(bundle / name) as reranker:
            assert reranker.engine.manifest.digest == Manifest.load(bundle).digest
    for name in ("config.json", "model.safetensors"):
        assert place(f"{bert}/{name}") == Path(bert)
        with pytest.raises(ModelNotFoundError, match=r"is a checkpoint, not a bundle; convert it"):
            Reranker(f"{bert}/{name}")
    with pytest.raises(ModelNotFoundError, match=r"is a part of the bundle .*--backend"):
        Reranker(bundle / "onnx-int8" / "model.onnx")
    with pytest.raises(ModelNotFoundError, match=r"^mini is a bundle already: .* -m mini\)"):
        convert("mini", None, tmp_path / "out")
    for part in (bundle, bundle / MANIFEST, bundle / "onnx-int8" / "model.onnx"):
        with pytest.raises(ModelNotFoundError, match=r"bundle already: score with it .*of, tiny$"):
            convert(str(part), None, tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match="is a bundle already"):
        Reranker(bundle, backend="torch")


def test_the_hubs_own_cache_is_known_by_its_folders(server: Hub, bundle: Path) -> None:
    commit = server.push(REPOSITORY, bundle)
    folder = locate(REPOSITORY).folder
    assert (folder.name, folder.parent.name) == (commit, "snapshots")
    with Reranker(folder.parents[1]) as reranker:
        assert reranker.engine.manifest.name == "tiny"


# Bundles


def test_only_what_runs_is_downloaded(
    server: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.push(REPOSITORY, bundle)
    with Reranker(REPOSITORY, backend="onnx-int8") as reranker:
        assert len(reranker.rank("red", ["mars", "bread"])) == 2
    assert sorted(server.asked) == ["onnx-int8/model.onnx", MANIFEST, TOKENIZER]
    # Downloaded files are not requested again and need no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Reranker(REPOSITORY, backend="onnx-int8").close()
    assert len(server.asked) == 3
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE keeps qrank from asking the hub"):
        Reranker(REPOSITORY, backend="onnx-fp32")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Reranker(REPOSITORY, backend="onnx-fp32").close()
    assert server.asked[3:] == ["onnx-fp32/model.onnx"]


def test_what_looks_at_all_variants_downloads_them(server: Hub, bundle: Path) -> None:
    server.push(REPOSITORY, bundle)
    folder = locate(REPOSITORY).folder
    assert {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } == {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


def test_a_located_bundle_is_not_looked_for_again(
    server: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.push(REPOSITORY, bundle)
    located = locate(REPOSITORY)

    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert locate(located) is located
    for name in ("onnx-int8", "onnx-fp16"):
        with Reranker(located, backend=name) as reranker:
            assert reranker.target.variant.name == name
            with pickle.loads(pickle.dumps(reranker)) as again:
                assert again.engine.bundle.folder == located.folder


def test_a_bundle_is_shown_without_being_downloaded(server: Hub, bundle: Path) -> None:
    server.push(REPOSITORY, bundle)
    shown = CliRunner().invoke(main, ["inspect", REPOSITORY])
    assert shown.exit_code == 0, shown.output
    assert sorted(server.asked) == [MANIFEST, TOKENIZER]
    Reranker(REPOSITORY, backend="onnx-int8").close()
    shown = CliRunner().invoke(main, ["inspect", REPOSITORY, "--verify"])
    assert "all 2 files are as the manifest says" in shown.stdout
    assert "not downloaded yet: onnx-fp16, onnx-fp32" in shown.stdout


def test_a_revision_pins_a_bundle(server: Hub, bundle: Path, tmp_path: Path) -> None:
    first = server.push(REPOSITORY, subset(bundle, tmp_path / "first", ["onnx-int8"]), "v1")
    server.push(REPOSITORY, subset(bundle, tmp_path / "second", ["onnx-int8", "onnx-fp16"]))
    for name in (f"{REPOSITORY}@v1", f"{REPOSITORY}@{first}", f"{server.url}/{REPOSITORY}/tree/v1"):
        assert list(locate(name).manifest.variants) == ["onnx-int8"]
    assert list(locate(REPOSITORY).manifest.variants) == ["onnx-int8", "onnx-fp16"]
    with Reranker(f"{REPOSITORY}@v1") as reranker:
        assert reranker.target.variant.name == "onnx-int8"


def test_a_bundle_is_not_converted_and_a_checkpoint_not_run(
    server: Hub, bundle: Path, bert: str
) -> None:
    server.push(REPOSITORY, bundle)
    server.push("they/their-model", Path(bert))
    with pytest.raises(
        ModelNotFoundError, match=r"their-bundle is a bundle already: score with it"
    ):
        convert(REPOSITORY)
    with pytest.raises(ModelNotFoundError, match=r"their-model on the hub is no bundle; convert"):
        Reranker("they/their-model", convert=False)
    with pytest.raises(ModelNotFoundError, match=r"on the hub, a bundle is a whole repository"):
        Reranker(f"{REPOSITORY}/onnx-int8/model.onnx")


# Checkpoints


@pytest.mark.usefixtures("ready_graph")
def test_a_checkpoint_is_converted_from_where_it_is_pasted(
    server: Hub, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[str] = []
    download = huggingface_hub.snapshot_download

    def counted(repository: str, **options: Any) -> Any:
        downloads.append(repository)
        return download(repository, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", counted)
    commit = server.push("they/their-model", Path(bert), "v1")
    target = str(tmp_path / "out")
    command = ["convert", "--to", "onnx", "--precision", "fp32", "-o", target]
    address = f"{server.url}/they/their-model/blob/v1/config.json"
    made = CliRunner().invoke(main, [*command, address])
    assert made.exit_code == 0, made.output
    assert downloads == ["they/their-model"] * 2, "the description, then the weights"
    source = Manifest.load(Path(target)).source
    assert (source.id, source.revision) == ("they/their-model", commit)
    made = CliRunner().invoke(main, [*command, "they/their-model", "--revision", "v1"])
    assert made.exit_code == 0, made.output
    made = CliRunner().invoke(main, [*command, "they/their-model@v2"])
    assert made.exit_code == ModelNotFoundError.exit_code
    assert "has no revision v2" in made.stderr


def test_a_file_and_a_folder_of_a_repository_are_taken(
    server: Hub, bundle: Path, bert: str, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(bert, theirs)
    shutil.copytree(bundle / "onnx-fp32", theirs / "onnx")
    server.push("they/theirs", theirs)
    for number, name in enumerate(("onnx/model.onnx", "tree/main/onnx")):
        made = convert(f"they/theirs/{name}", None, tmp_path / f"out-{number}")
        assert list(made.manifest.variants) == ["onnx-fp32"]
        assert not made.manifest.probes.verified
    with pytest.raises(ModelNotFoundError, match=r"they/theirs on the hub has no file other\.onnx"):
        convert("they/theirs/onnx/other.onnx", None, tmp_path / "out")


# Files that the hub does not provide


def refusal(name: str = "they/locked", **options: Any) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        Reranker(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "GatedRepo",
            "accepted its licence: do so at {url}/they/locked, then log in with `hf",
        ),
        (401, "RepoNotFound", "none of that name, or a private one: look at {url}/they/locked."),
        (403, "", "; see whether your token may read it (`hf auth login`, HF_TOKEN)"),
        (404, "RevisionNotFound", "has no revision main: {url}/they/locked/tree/main shows"),
    ],
)
def test_a_refusal_says_what_to_do(
    status: int, code: str, message: str, server: Hub, bundle: Path
) -> None:
    server.push("they/locked", bundle)
    server.refused["they/locked"] = (status, code)
    assert message.format(url=server.url) in refusal()


def test_no_such_repository_is_told(server: Hub) -> None:
    assert "the hub has none of that name, or a private one" in refusal("they/nothing")


def test_no_network_is_told(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("http://127.0.0.1:9", monkeypatch)
    assert "http://127.0.0.1:9 cannot be reached (" in refusal("they/anything")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError(), "cannot be reached (TimeoutError)"),
        (OSError(28, "No space left on device"), "cannot be stored: the disk at "),
        (ValueError("\n\n  odd\nmore"), "the hub did not give it: odd"),
        (RuntimeError(), "the hub did not give it: RuntimeError"),
    ],
)
def test_an_error_without_a_message_is_told_too(
    error: Exception, message: str, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert message in refusal("they/anything")


def test_offline_is_told(server: Hub, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", "they/anything", "--offline"])
    assert result.exit_code == ModelNotFoundError.exit_code
    assert "was not downloaded before: --offline keeps qrank from asking" in result.stderr


# Progress bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_on_a_terminal_while_the_rest_stands_still(
    server: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.push(REPOSITORY, bundle)
    terminal, marks = Terminal(), []
    enable_progress_bars()  # transformers disables them when it is quiet
    monkeypatch.setattr(sys, "stderr", terminal)

    @contextmanager
    def pause() -> Iterator[None]:
        marks.append(terminal.tell())
        yield
        marks.append(terminal.tell())

    with hub.stepping_aside(pause):
        hub.download(REPOSITORY, [TOKENIZER])
    assert marks[0] == 0
    assert "Fetching 1 files" in terminal.getvalue()
    assert terminal.tell() == marks[1]


def test_elsewhere_nothing_is_drawn(
    server: Hub, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.push(REPOSITORY, bundle)
    enable_progress_bars()
    Reranker(REPOSITORY, backend="onnx-int8").close()
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_a_hub_bundle_runs_by_the_real_variable(server: Hub, bundle: Path, tmp_path: Path) -> None:
    """With HF_ENDPOINT set as a user would: nothing is patched here."""
    from test_surroundings import python

    server.push(REPOSITORY, bundle)
    code = "import sys\nfrom qrank.cli import main\nmain(sys.argv[1:])"
    command = ["score", "-m", REPOSITORY, "-q", "red", "--backend", "onnx-int8", "-f", "json"]
    (tmp_path / "d.txt").write_text("mars is red\nbread\n", "utf-8")
    done = python(
        code,
        *command,
        "d.txt",
        folder=tmp_path,
        HF_ENDPOINT=server.url,
        HF_HUB_OFFLINE="0",
        HF_HOME=tmp_path / "home",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["results"]) == 2
