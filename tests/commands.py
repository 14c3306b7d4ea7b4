"""Ways to run qrank's command line: in this process, in a shell, on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qrank.cli import main

QUERY = "a"


def qrank_(*arguments: str | Path, stdin: str | bytes = "") -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def score(
    bundle: Path, *arguments: str | Path, stdin: str | bytes = "", backend: str = "fakes:length"
) -> Result:
    """Score with a backend whose logit is the pair's token count: longer is better."""
    head = ("score", "-m", bundle, "--backend", backend, "-q", QUERY)
    return qrank_(*head, *arguments, stdin=stdin)


def shell(
    command: str, bundle: Path, *, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `qrank`, `$BUNDLE` and the fakes are available."""
    here = str(Path(__file__).parent)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        env={
            **os.environ,
            "BUNDLE": str(bundle),
            "PATH": path,
            "PYTHONPATH": here,
            "COLUMNS": "80",
            "TERM": "xterm",
        },
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_a_terminal(command: str, bundle: Path) -> str:
    """Run a command with its output on a terminal of 80 columns; return that output."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    ours, theirs = pty.openpty()
    try:
        done = shell(command, bundle, stdout=theirs)
    finally:
        os.close(theirs)
    written = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # on Linux: the other end is closed
            break
        if not block:
            break
        written += block
    os.close(ours)
    assert done.returncode == 0, done.stderr
    return written.decode()
