"""The house stands: lower floors import no higher ones, and every file has a floor."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A new file fails the tests until it is placed here.
FLOORS = [
    {"errors", "child", "disk", "extras", "machine", "work", "paths", "family", "fidelity"}
    | {"arguments", "bundle", "cache", "cgroups", "memory", "version"}
    | {"safejson", "signals", "textfiles", "words"},
    {"hub", "hub_names", "locate", "encoding", "batching", "budget", "activation", "items"}
    | {"calibration", "collection", "measures", "records", "scoring_graph", "windows"},
    {
        "isolation",
        "backends",
        "backends.gguf",
        "backends.gguf_context",
        "backends.gguf_decoder",
        "backends.llama",
        "backends.mapped",
        "backends.onnx",
        "backends.openvino",
        "backends.torch",
    },
    {"losses", "proof", "selection", "targets"},
    {"reranker"},
    {"", "bench", "doctor", "plots", "runs", "survey", "trial", "tuning"}
    | {"scored", "evaluation", "reliability"},
    {
        "serve",
        "serve.app",
        "serve.batcher",
        "serve.body",
        "serve.dialects",
        "serve.guard",
        "serve.listening",
        "serve.metrics",
        "serve.request",
        "serve.routing",
        "serve.schemas",
        "serve.server",
        "serve.service",
        "serve.validation",
    },
    {"cli", "cli.common", "cli.convert", "cli.models", "cli.output", "cli.score"}
    | {
        "cli.bench",
        "cli.cache",
        "cli.calibrate",
        "cli.data",
        "cli.doctor",
        "cli.evaluate",
        "cli.progress",
        "cli.serve",
        "cli.spinner",
        "cli.streams",
        "cli.tune",
        "__main__",
    },
]
FLOOR = {
    f"qrank.{name}".rstrip("."): number for number, names in enumerate(FLOORS) for name in names
}
HIGHEST_FOR_CONVERTERS = 2
TORCH = {"torch", "transformers"}


def modules() -> dict[str, Path]:
    """Every module's name and file, converters under their installed name."""
    found = {}
    for folder, package in (("qrank", "qrank"), ("converters", "qrank.converters")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()
RUNTIME = [name for name in MODULES if not name.startswith("qrank.converters")]
CONVERTERS = [name for name in MODULES if name.startswith("qrank.converters")]


def imports(tree: ast.AST) -> set[str]:
    """Modules that a tree imports anywhere in it, also where only types are checked."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text("utf-8"), str(MODULES[name]))


def own(name: str) -> set[str]:
    return {found for found in imports(parsed(name)) if found.split(".")[0] == "qrank"}


def test_every_module_has_a_floor() -> None:
    assert sorted(RUNTIME) == sorted(FLOOR)


@pytest.mark.parametrize("name", RUNTIME)
def test_no_floor_imports_a_higher_one(name: str) -> None:
    for found in own(name):
        if not found.startswith("qrank.converters"):
            assert FLOOR[found] <= FLOOR[name], f"{name} imports {found}"


def test_there_are_no_cycles() -> None:
    graph = {name: own(name) - {name} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


# When called, and not before.
REACH_CONVERTERS = {"qrank.cli.convert": {"convert"}, "qrank.backends.torch": {"as_bundle", "open"}}


@pytest.mark.parametrize("name", RUNTIME)
def test_the_runtime_reaches_converters_where_a_checkpoint_is_read_only(name: str) -> None:
    tree = parsed(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in REACH_CONVERTERS.get(name, set()):
            assert any(found.startswith("qrank.converters") for found in imports(node))
            node.body = [ast.Pass()]
    assert not [found for found in imports(tree) if found.startswith("qrank.converters")]


@pytest.mark.parametrize("name", CONVERTERS)
def test_converters_import_the_lower_floors_only(name: str) -> None:
    for found in own(name):
        if not found.startswith("qrank.converters"):
            assert FLOOR[found] <= HIGHEST_FOR_CONVERTERS, f"{name} imports {found}"


def test_the_scoring_graph_is_for_torch_and_what_is_exported_from_it() -> None:
    users = {name for name in MODULES if "qrank.scoring_graph" in own(name)}
    assert users == {"qrank.backends.torch", "qrank.converters.onnx"}


@pytest.mark.parametrize("name", [n for n in RUNTIME if n != "qrank.scoring_graph"])
def test_the_runtime_imports_no_torch(name: str) -> None:
    assert not {found.split(".")[0] for found in imports(parsed(name))} & TORCH
