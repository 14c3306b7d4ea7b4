"""qrank runs where it is put: no writable home, no network, one thread; and leaves no traces."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrank import Reranker, paths
from qrank.bundle import Manifest, Probes, check_files
from qrank.errors import BundleError, TargetError

SCORE = """
import sys
from qrank import Reranker
with Reranker(sys.argv[1], backend="onnx", threads=int(sys.argv[2])) as reranker:
    assert len(reranker.rank("which planet is red?", ["mars", "bread"] * 10)) == 20
"""


def python(
    code: str, *arguments: str | Path, folder: Path, **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: what surrounds it is read once."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**environment, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("QRANK_CACHE", str(tmp_path / "cache"))
    paths.cache_folder.cache_clear()
    yield tmp_path / "cache"
    paths.cache_folder.cache_clear()


@pytest.fixture
def copy(tmp_path: Path, bundle: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


# /dev/null is a file: nothing can be written below it, not even by root.
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
    assert written - set(folders) == {"cache", "cache/proven.json", "cache/verified.json"}


def test_without_network_a_hub_id_is_told_at_once(tmp_path: Path) -> None:
    code = "from qrank import Reranker; Reranker('someone/some-reranker')"
    done = python(code, folder=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=tmp_path / "hub")
    assert done.returncode == 1
    assert "ModelNotFoundError: someone/some-reranker is no folder here" in done.stderr


def test_hashes_are_remembered(cache: Path, copy: Path) -> None:
    """Shown by a change that keeps size and time: only hashing can see it."""
    Reranker(copy).close()
    tokenizer = copy / "tokenizer.json"
    before = tokenizer.stat()
    place = tokenizer.read_bytes().index(b'"truncation"')
    with tokenizer.open("r+b") as file:
        file.seek(place)
        file.write(b'"truncatiom"')
    os.utime(tokenizer, ns=(before.st_atime_ns, before.st_mtime_ns))
    files = Manifest.load(copy).files
    check_files(copy, files)
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        check_files(copy, files, always_hash=True)
    (cache / "verified.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        Reranker(copy)


def test_a_changed_file_is_hashed_again(cache: Path, copy: Path) -> None:
    with Reranker(copy) as reranker:
        variant = reranker.target.variant
    path = copy / next(iter(variant.files))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{path.name} is damaged"):
        check_files(copy, variant.files)


def test_the_proof_is_remembered(cache: Path, copy: Path) -> None:
    """Shown by wrong probes: refused when looked at, and not looked at when known as proven."""
    right = Manifest.load(copy)
    Reranker(copy).close()
    proven = (cache / "proven.json").read_text("utf-8")
    assert right.digest in proven
    probes = right.probes
    wrong = Manifest(
        right.name,
        right.family,
        right.source,
        right.files,
        Probes(probes.work, probes.logits + 50, probes.reference),
        right.variants,
    )
    wrong.save(copy)
    with pytest.raises(TargetError, match="computes wrongly"):
        Reranker(copy)
    now = json.loads((cache / "proven.json").read_text("utf-8"))
    assert not any(held for key, held in now.items() if key.startswith(wrong.digest))
    (cache / "proven.json").write_text(proven.replace(right.digest, wrong.digest), "utf-8")
    Reranker(copy).close()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}', "\x00\xff"])
def test_a_damaged_cache_is_ignored_and_made_anew(cache: Path, bundle: Path, content: str) -> None:
    cache.mkdir()
    for name in ("verified.json", "proven.json"):
        (cache / name).write_text(content, "latin-1")
    Reranker(bundle).close()
    digest = Manifest.load(bundle).digest
    assert any(key.startswith(digest) for key in json.loads((cache / "proven.json").read_text()))


def test_a_read_only_bundle_is_enough(cache: Path, copy: Path) -> None:
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    names = sorted(copy.rglob("*"))
    Reranker(copy).close()
    assert sorted(copy.rglob("*")) == names
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755)
