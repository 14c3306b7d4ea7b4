"""What is in deploy/, and the Dockerfile, as far as it can be checked without running it."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from qrank.cli import main

ROOT = Path(__file__).parent.parent
UNIT = (ROOT / "deploy/qrank.service").read_text("utf-8")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    program = tmp_path / "qrank"
    program.write_text("#!/bin/sh\n", "utf-8")
    program.chmod(0o755)
    unit = tmp_path / "qrank.service"
    unit.write_text(UNIT.replace("/opt/qrank/bin/qrank", str(program)), "utf-8")

    def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", *arguments, str(unit)]
        return subprocess.run(command, capture_output=True, text=True)

    verified = analyze("verify")
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    # From 0, nothing is exposed, to 10; without any of it: 9.6.
    judged = analyze("security", "--offline=true", "--threshold=20")
    assert judged.returncode == 0, judged.stdout


def test_the_unit_starts_a_command_that_exists() -> None:
    (line,) = re.findall(r"^ExecStart=/opt/qrank/bin/qrank (.*)$", UNIT, re.MULTILINE)
    name, *arguments = line.replace("%d/keys", __file__).split()
    command = main.commands[name]
    command.make_parser(click.Context(command)).parse_args(arguments)


def test_the_image_gets_all_that_the_wheel_is_made_of() -> None:
    """An image that lacks a folder of a package cannot be built."""
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    assert sources <= allowed
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    places = setuptools["package-dir"]
    for package in setuptools["packages"]:
        known = [name for name in places if package == name or package.startswith(f"{name}.")]
        folder = places[known[0]] if known else package.replace(".", "/")
        assert any(f"{folder}/".startswith(f"{name}/") for name in sources), folder
