"""The documentation matches what the backends declare."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from tables import TABLES

from qrank.backends import formats, spec
from qrank.cli import main

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", TABLES)
def test_a_table_is_as_generated(path: str) -> None:
    table = "\n".join(["", *TABLES[path](), "", ""])
    assert table in (ROOT / path).read_text("utf-8"), f"see `python tests/tables.py`:{table}"


def test_the_docs_say_of_every_target_how_far_it_is_verified() -> None:
    text = (ROOT / "docs/hardware.md").read_text("utf-8")
    rows = text.partition("| target | verified |\n")[2].partition("\n\n")[0]
    for name, format in formats().items():
        for precision in format.made:
            assert f"`{name}-{precision}`" in rows
        (line,) = [line for line in rows.splitlines() if f"{name} on " in line]
        for kind in spec(name).kinds:
            assert kind == "cpu" or f"`{kind}`" in line


@pytest.mark.parametrize("command", ["score", "serve", "eval"])
def test_help_names_every_kind_of_device(command: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    for name in formats():
        for kind in spec(name).kinds:
            assert kind in text.partition("--device")[2].partition("--")[0]


def test_help_names_every_format_and_precision() -> None:
    text = " ".join(CliRunner().invoke(main, ["convert", "--help"]).output.split())
    assert f"[{'|'.join(formats())}]" in text
    for name, format in formats().items():
        assert f"{name}: {', '.join(format.made)}" in text
