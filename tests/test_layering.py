"""Layering of the package: lower floors import no higher ones, and every room has a floor."""

import ast

import pytest
from rooms import (
    FLOOR,
    MODULES,
    ROOT,
    arrows,
    circles,
    described,
    imports,
    own,
    parsed,
    room,
    upward,
)

RUNTIME = [name for name in MODULES if not name.startswith("qrank.converters")]
TORCH = {"torch", "transformers"}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_floor_imports_a_higher_one() -> None:
    assert not upward()


def test_there_are_no_circles() -> None:
    assert not circles()


def test_the_house_is_small() -> None:
    assert len(FLOOR) <= 22
    assert len(arrows()) <= 114


def test_the_documentation_names_every_room_and_file() -> None:
    assert (ROOT / "docs" / "rooms.md").read_text("utf-8") == described()


# Functions that import the converters when called, not earlier.
REACH_CONVERTERS = {
    "qrank.cli.convert": {"convert"},
    "qrank.cli.export": {"export"},
    "qrank.cli.models": {"models"},
    "qrank.backends.torch": {"as_bundle", "open"},
    "qrank.select.obtain": {"_converted"},
}


@pytest.mark.parametrize("name", RUNTIME)
def test_the_runtime_reaches_converters_where_a_checkpoint_is_read_only(name: str) -> None:
    tree = parsed(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in REACH_CONVERTERS.get(name, set()):
            assert any(found.startswith("qrank.converters") for found in imports(node))
            node.body = [ast.Pass()]
    assert not [found for found in imports(tree) if found.startswith("qrank.converters")]


def test_the_scoring_graph_is_for_torch_and_what_is_exported_from_it() -> None:
    users = {name for name in MODULES if "qrank.converters.checkpoint.scoring_graph" in own(name)}
    assert users == {"qrank.backends.torch", "qrank.converters.onnx.export"}


@pytest.mark.parametrize("name", RUNTIME)
def test_the_runtime_imports_no_torch(name: str) -> None:
    assert not {found.split(".")[0] for found in imports(parsed(name))} & TORCH
