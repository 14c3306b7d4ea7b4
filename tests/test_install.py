"""qrank on a machine without a network, and frozen into an application of one file.

In new environments, from a package index: `make frozen` runs these, `make test` does not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.install

Words = list[str | Path]

APP = (ROOT / "examples/frozen/app.py").read_text("utf-8")

COUNTED = f"""
import os
with open(os.environ["STARTS"], "a", encoding="utf-8") as file:
    file.write("started\\n")
{APP}
"""
"""The example, which writes a line at each of its starts."""


def run(*command: str | Path, **variables: str | Path) -> str:
    """What a command prints, started as by a user without qrank's cache."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment, with qrank from a wheelhouse alone."""
    folder = tmp_path_factory.mktemp("offline")
    run(sys.executable, ROOT / "deploy/wheelhouse.py", "--out", folder / "wheels")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv/bin/python"
    pip: Words = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # A configured index or folder would be asked otherwise.
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    run(*pip, "--no-index", "--find-links", folder / "wheels", "qrank[onnx]", **alone)
    return python


def test_a_wheelhouse_is_enough_to_install_and_rank(offline: Path, tmp_path: Path) -> None:
    ranked = run(offline, ROOT / "examples/frozen/app.py", QRANK_CACHE=tmp_path / "cache")
    assert [line.partition("\t")[2] for line in ranked.splitlines()] == [
        "Mars is red.",
        "Bees make honey.",
    ]


def test_an_application_of_one_file_ranks_alike_and_starts_once(
    offline: Path, tmp_path: Path
) -> None:
    pip: Words = [sys.executable, "-m", "pip", "--python", offline, "install", "--quiet"]
    run(*pip, "pyinstaller>=6.10")
    (tmp_path / "app.py").write_text(COUNTED, "utf-8")
    places: Words = [
        "--distpath",
        tmp_path,
        "--workpath",
        tmp_path / "work",
        "--specpath",
        tmp_path,
    ]
    freeze: Words = [offline.with_name("pyinstaller"), "--onefile", "--log-level", "ERROR"]
    run(*freeze, *places, tmp_path / "app.py")
    app = tmp_path / "app"
    assert app.stat().st_size < 100e6
    variables = {"STARTS": tmp_path / "starts", "QRANK_CACHE": tmp_path / "cache"}
    score: Words = ["score", "-q", "how do plants make food?", ROOT / "docs/sample/passages.txt"]
    uses: list[Words] = [[], [], score, ["doctor"]]
    for arguments in uses:
        printed = run(app, *arguments, **variables)
        assert printed == run(offline, tmp_path / "app.py", *arguments, **variables)
    # No child of it started it again: those that qrank tries things in would be it.
    assert (tmp_path / "starts").read_text("utf-8").count("started") == 2 * 4
    # Its own proof, and no hashes of files that are elsewhere at the next start.
    assert len(list((tmp_path / "cache/proofs").iterdir())) == 2
    assert len(list((tmp_path / "cache/hashes").iterdir())) == 2
