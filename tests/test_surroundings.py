"""qrank runs without a writable home or network, or with one thread, and leaves no traces."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from qrank import Reranker
from qrank.backends import keys
from qrank.bundle.manifest import Manifest
from qrank.bundle.opened import Bundle
from qrank.cli import main
from qrank.errors import BundleError, TargetError
from qrank.select.verify import _Case
from qrank.system import cache, extras, machine
from qrank.system.cache import store

SCORE = """
import sys
from qrank import Reranker
from qrank.backends import keys
with Reranker(sys.argv[1], backend="onnx", threads=int(sys.argv[2])) as reranker:
    assert len(reranker.rank("which planet is red?", ["mars", "bread"] * 10)) == 20
"""


def python(
    code: str, *arguments: str | Path, folder: Path, **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run code in a separate process, because the environment is read only once."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**environment, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path, bundle: Path) -> Path:
    """A modifiable copy of a bundle."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


# /dev/null is not a folder: nothing can be written below it, not even by root.
@pytest.mark.parametrize(
    "variables",
    [
        {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "", "QRANK_CACHE": ""},
        {"HOME": "/dev/null/home", "QRANK_CACHE": "/dev/null/cache", "HF_HOME": "/dev/null/hub"},
    ],
    ids=["home", "cache"],
)
def test_works_where_nothing_can_be_written(
    bundle: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    done = python(SCORE, bundle.resolve(), "1", folder=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (0, "")
    (notice,) = done.stderr.splitlines()
    assert notice.startswith("no cache: ")
    assert "set QRANK_CACHE" in notice
    assert list(tmp_path.iterdir()) == []


def test_writes_below_the_cache_folder_alone(bundle: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("home", "here", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    done = python(
        SCORE,
        bundle.resolve(),
        "2",
        folder=folders["here"],
        HOME=folders["home"],
        TMPDIR=folders["temporary"],
        XDG_CACHE_HOME="",
        HF_HOME="",
        QRANK_CACHE=tmp_path / "cache",
    )
    assert (done.returncode, done.stderr) == (0, "")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    kept = {name for name in written - set(folders) if not name.endswith(".json")}
    assert kept == {"cache", "cache/hashes", "cache/proofs"}
    assert {name.partition("/")[0] for name in written} == {"cache", *folders}


def test_without_network_a_hub_id_is_told_at_once(tmp_path: Path) -> None:
    code = "from qrank import Reranker; Reranker('someone/some-reranker')"
    done = python(code, folder=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=tmp_path / "hub")
    assert done.returncode == 1
    assert "ModelNotFoundError: someone/some-reranker is no folder here" in done.stderr


def test_hashes_are_remembered(own_cache: Path, copy: Path) -> None:
    """Tested with a change that keeps size and time, so only hashing can detect it."""
    Reranker(copy).close()
    tokenizer = copy / "tokenizer.json"
    before = tokenizer.stat()
    place = tokenizer.read_bytes().index(b'"truncation"')
    with tokenizer.open("r+b") as file:
        file.seek(place)
        file.write(b'"truncatiom"')
    os.utime(tokenizer, ns=(before.st_atime_ns, before.st_mtime_ns))
    opened = Bundle.load(copy)
    files = opened.manifest.files
    opened.check(files)
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        opened.check(files, always_hash=True)
    cache.clear("hashes")
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        Reranker(copy)


def test_a_changed_file_is_hashed_again(own_cache: Path, copy: Path) -> None:
    with Reranker(copy) as reranker:
        variant = reranker.target.variant
    path = copy / next(iter(variant.files))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{path.name} is damaged"):
        Bundle.load(copy).check(variant.files)


def test_the_proof_is_remembered(own_cache: Path, copy: Path) -> None:
    """Tested with wrong probes: refused when checked, but not checked if the proof is stored."""
    with Reranker(copy, backend="onnx-int8") as reranker:
        options = reranker.choice.options
    (path,) = (own_cache / "proofs").iterdir()
    right = json.loads(path.read_text("utf-8"))
    manifest = Manifest.load(copy)
    replace(manifest, probes=replace(manifest.probes, logits=manifest.probes.logits + 50)).save(
        copy
    )
    with pytest.raises(TargetError, match="computes wrongly"):
        Reranker(copy, backend="onnx-int8")
    target = reranker.target
    key = _Case(Bundle.load(copy), target, options, None)._key()
    assert key is not None
    store("proofs", key, right["record"])
    Reranker(copy, backend="onnx-int8").close()


def test_an_application_of_one_file_remembers_what_holds_at_its_next_start(
    own_cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its modules are no files, and its files lie elsewhere at each start."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", str(copy.parent), raising=False)
    origin = SimpleNamespace(origin=str(copy.parent / "onnxruntime/__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: origin)
    Reranker(copy, backend="onnx-int8").close()
    assert [path.name for path in own_cache.iterdir()] == ["proofs"]


def test_a_module_whose_package_is_not_installed_is_absent() -> None:
    assert extras.find("not_installed.core") is None
    assert machine.packages(("not_installed.core",)) == []


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (keys, {"__version__": "99.0"}),
        (keys, {"runtime": lambda name: ["openvino-0.1"]}),
        (machine, {"cpu": lambda: "another"}),
    ],
    ids=["qrank", "runtime", "cpu"],
)
def test_another_version_or_machine_is_proven_anew(
    own_cache: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    change: dict[str, object],
) -> None:
    Reranker(bundle, backend="onnx-int8").close()
    assert len(list((own_cache / "proofs").iterdir())) == 1
    for name, value in change.items():
        monkeypatch.setattr(place, name, value)
    Reranker(bundle, backend="onnx-int8").close()
    assert len(list((own_cache / "proofs").iterdir())) == 2


def test_a_device_with_a_driver_is_another_with_another_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = [keys.conditions("openvino", device) for device in ("cpu", "gpu")]
    monkeypatch.setattr(machine, "accelerators", lambda: ["driver 2"])
    now = [keys.conditions("openvino", device) for device in ("cpu", "gpu")]
    assert (here[0] == now[0], here[1] == now[1]) == (True, False)


CONTENTS = ["", "{", "[]", "null", '{"a": 1}', "\x00\xff", "[" * 100_000, '{"key": 1, "record": 2}']


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_damaged_cache_is_told_ignored_and_made_anew(
    own_cache: Path, bundle: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    Reranker(bundle, backend="onnx-int8").close()
    whole = {path: path.read_text("utf-8") for path in own_cache.rglob("*.json")}
    assert len(whole) == 3
    for path in whole:
        path.write_text(content, "latin-1")
    Reranker(bundle, backend="onnx-int8").close()
    assert caplog.text.count("ignoring ") == 3
    for path in whole:
        assert json.loads(path.read_text("utf-8"))["key"] == json.loads(whole[path])["key"]


WRITE = """
import sys
from qrank.system import cache
for number in range(20):
    cache.store("proofs", {"writer": sys.argv[1], "number": number}, {"held": number})
"""


def test_processes_that_write_at_once_lose_nothing(own_cache: Path, tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for name in "abc":
        for number in range(20):
            key = {"writer": name, "number": number}
            assert cache.load("proofs", key, lambda held: held) == number


def test_the_cache_is_shown_and_cleared_by_kind(own_cache: Path, bundle: Path) -> None:
    def shown(*arguments: str) -> dict[str, int]:
        result = CliRunner().invoke(main, ["cache", *arguments])
        assert result.exit_code == 0, result.output
        folder, *lines = result.stdout.splitlines()
        assert folder == str(own_cache)
        assert max(map(len, lines)) <= 80
        return {line.split()[0]: int(line.split()[1]) for line in lines}

    assert set(shown().values()) == {0}
    Reranker(bundle, backend="openvino-int8").close()
    held = shown()
    assert (held["hashes"], held["proofs"], held["openvino"]) == (3, 1, 1)
    left = shown("--clear", "proofs", "--clear", "openvino")
    assert left == held | {"proofs": 0, "openvino": 0}
    assert set(shown("--clear", "all").values()) == {0}
    Reranker(bundle, backend="openvino-int8").close()
    assert CliRunner().invoke(main, ["cache", "--clear", "everything"]).exit_code == 2


def test_a_read_only_bundle_is_enough(own_cache: Path, copy: Path) -> None:
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    names = sorted(copy.rglob("*"))
    Reranker(copy).close()
    assert sorted(copy.rglob("*")) == names
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755)
