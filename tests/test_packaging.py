"""The contents of wheel and sdist, and a working installation from the wheel.

Unlisted packages and data files are left out silently; an editable install hides this.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def git_files() -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what belongs to the project cannot be told")
    # Include untracked files, so that a missing new module is noticed before it is committed.
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a clean copy, without files that git ignores."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in git_files():
        # Large files that belong in neither; the tests below name them.
        if not name.endswith(".safetensors"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    (source / "models/mini").mkdir(parents=True, exist_ok=True)
    (source / "models/mini/model.safetensors").write_bytes(b"weights")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist_names(built: Path) -> set[str]:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def belongs(name: str) -> bool:
    """Whether a file of the repository should be installed."""
    folder = name.partition("/")[0]
    return (
        (
            folder in ("qrank", "converters", "models", "haystack_integrations")
            and name.endswith(".py")
        )
        or name == "qrank/py.typed"
        or (folder == "models" and name.endswith(".toml") and name.count("/") == 1)
        or (folder == "converters" and name.endswith(".jsonl"))
        or (name.startswith("deploy/pyinstaller/") and name.endswith(".py"))
        or name.startswith("qrank/serve/static/")
        or name.startswith("models/mini/bundle/")
    )


def installed_name(name: str) -> str:
    own = name.startswith(("qrank/", "haystack_integrations/"))
    return name if own else f"qrank/{name.replace('deploy/pyinstaller/', '__pyinstaller/')}"


def test_the_wheel_holds_what_is_installed_and_nothing_else(wheel_names: set[str]) -> None:
    expected = {installed_name(name) for name in git_files() if belongs(name)}
    assert "qrank/models/bert.toml" in expected
    assert "qrank/converters/checkpoint/probes.jsonl" in expected
    found = {name for name in wheel_names if ".dist-info/" not in name}
    assert found == expected


def test_the_wheel_holds_the_licence_and_the_command(wheel_names: set[str]) -> None:
    kept = {name.partition(".dist-info/")[2] for name in wheel_names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= kept


def test_the_sdist_holds_all_that_the_wheel_is_made_of(sdist_names: set[str]) -> None:
    expected = {name for name in git_files() if belongs(name)}
    expected |= {"LICENSE", "README.md", "pyproject.toml"}
    assert expected <= sdist_names


def test_neither_holds_weights_training_or_tests(
    wheel_names: set[str], sdist_names: set[str]
) -> None:
    for name in wheel_names | sdist_names:
        assert not name.endswith(".safetensors")
        assert "training/" not in name
        assert not name.startswith("tests/")


USE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import qrank
from importlib import resources
from qrank.cli import main
from qrank.converters.checkpoint.card import cards
from qrank.bundle.locate import bundled
assert Path(qrank.__file__).is_relative_to(sys.argv[1]), qrank.__file__
assert str(resources.files("qrank.models")).startswith(sys.argv[1])
import qrank.converters.checkpoint.probes
assert len(qrank.converters.checkpoint.probes.probe_pairs()) >= 32
print(*(card.name for card in cards()), *bundled())
"""


def test_a_copy_installed_from_the_wheel_works(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command = [*pip, "--disable-pip-version-check", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Isolated, so that the editable install does not take precedence over the copy.
    used = subprocess.run(
        [sys.executable, "-I", "-c", USE, str(target)], cwd=tmp_path, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    expected = sorted(path.stem for path in (ROOT / "models").glob("*.toml"))
    assert used.stdout.split()[: len(expected)] == expected
