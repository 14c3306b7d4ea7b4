"""The import graph of qrank: modules, the rooms that contain them, and imports between rooms.

`python tests/rooms.py` prints it; with `--markdown`, it prints docs/rooms.md. A room is a package
or a module next to the packages.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent

FLOORS: list[set[str]] = [
    {"errors"},
    {"system"},
    {"bundle"},
    {"scoring"},
    {"converters.checkpoint"},
    {"backends"},
    {"converters"},
    {"select", "converters.onnx", "converters.gguf", "converters.mlx"},
    {"engine", "converters.openvino"},
    {"reranker"},
    {"cascade", "measure", "pairs"},
    {"quality", "serve", "integrations"},
    {"cli"},
    {""},
]
"""Rooms, lowest floor first. A room imports lower floors only.

"" is the package itself, with its two entry points: `import qrank` and `qrank.__main__`.
"""

FLOOR = {
    f"qrank.{name}".rstrip("."): number for number, names in enumerate(FLOORS) for name in names
}


def modules() -> dict[str, Path]:
    """Every module's name -> file, converters under their installed name."""
    found = {}
    for folder, package in (("qrank", "qrank"), ("converters", "qrank.converters")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> set[str]:
    """Modules that are imported anywhere in a tree, including in `TYPE_CHECKING` blocks."""
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
    """A module's syntax tree."""
    return ast.parse(MODULES[name].read_text("utf-8"), str(MODULES[name]))


def own(name: str) -> set[str]:
    """Modules of qrank that a module imports."""
    return {found for found in imports(parsed(name)) if found.split(".")[0] == "qrank"}


def room(name: str) -> str:
    """The room that a module belongs to."""
    if name == "qrank.__main__":
        return "qrank"
    package = name.rpartition(".")[0]
    is_package = MODULES[name].name == "__init__.py"
    return name if is_package or package == "qrank" else package


def arrows() -> dict[tuple[str, str], set[str]]:
    """(room, room that it imports) -> the imports between them, each as "importer imported"."""
    found = defaultdict(set)
    for name in MODULES:
        for other in own(name):
            if (start := room(name)) != (end := room(other)):
                found[start, end].add(f"{name} {other}")
    return dict(found)


def upward() -> list[str]:
    """Imports between rooms whose target is not on a lower floor."""
    return sorted(
        line
        for (start, end), lines in arrows().items()
        if FLOOR[end] >= FLOOR[start]
        for line in lines
    )


def circles() -> list[str]:
    """The modules of an import cycle; [] if there is none."""
    try:
        list(TopologicalSorter({name: own(name) - {name} for name in MODULES}).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def described() -> str:
    """docs/rooms.md: every file with the first line of its docstring, highest floor first."""
    lines = [
        "# Rooms and files",
        "",
        "Printed by `python tests/rooms.py --markdown`; a test compares. A room imports rooms of",
        "lower floors only. `qrank.converters` lies in `converters/`.",
    ]
    for floor in reversed(range(len(FLOORS))):
        for name in sorted(f"qrank.{room}".rstrip(".") for room in FLOORS[floor]):
            lines += ["", f"## Floor {floor}: `{name}`", ""]
            for module in sorted(module for module in MODULES if room(module) == name):
                text = ast.get_docstring(parsed(module)) or ""
                path = MODULES[module].relative_to(ROOT).as_posix()
                if module == name and path.endswith("__init__.py"):
                    lines[-1:] = ["", _first_line(text), ""]
                else:
                    lines.append(f"- `{path}`: {_first_line(text)}")
    return "\n".join(lines) + "\n"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def main() -> None:
    """Print the graph, or docs/rooms.md with --markdown."""
    if "--markdown" in sys.argv:
        print(described(), end="")  # noqa: T201
        return
    found = arrows()
    rooms = sorted({room(name) for name in MODULES}, key=lambda name: (-FLOOR[name], name))
    for name in rooms:
        files = sum(room(module) == name for module in MODULES)
        below = sorted(end.removeprefix("qrank.") for start, end in found if start == name)
        print(f"{FLOOR[name]:2} {name:29} {files:2} files -> {', '.join(below)}")  # noqa: T201
    floors = len({FLOOR[name] for name in rooms})
    print(  # noqa: T201
        f"{len(rooms)} rooms on {floors} floors, {len(found)} arrows between rooms, "
        f"{len(upward())} imports upward, circles: {circles() or 'none'}"
    )


if __name__ == "__main__":
    main()
