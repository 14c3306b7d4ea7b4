"""Names, numbers and drawings that must stay consistent."""

import importlib
import inspect
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import qrank
from qrank import errors
from qrank.backends import BACKENDS, spec
from qrank.errors import QrankError
from qrank.system import extras

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
KINDS: dict[str, type[QrankError]] = {name: getattr(errors, name) for name in errors.__all__}


def test_public_names() -> None:
    assert sorted(qrank.__all__) == [
        "Cascade",
        "QrankError",
        "Ranking",
        "Reranker",
        "__version__",
        "score_files",
        "tune",
    ]
    for name in qrank.__all__:
        assert hasattr(qrank, name)


def test_every_error_is_exported_and_described() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, QrankError)
    }
    assert defined == set(errors.__all__)
    for kind in KINDS.values():
        assert kind.__doc__


def test_the_drawn_tree_is_the_tree() -> None:
    assert errors.__doc__
    drawn: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([ │├└─]*)(\w+Error) .*\((?:exit )?(\d+)\)$", line):
            indent, name, code = len(found[1]), found[2], int(found[3])
            above = [item for item in above if item[0] < indent]
            drawn[name] = (above[-1][1] if above else None, code)
            above.append((indent, name))
    actual = {}
    for name, kind in KINDS.items():
        parent = kind.__bases__[0]
        shown = parent.__name__ if issubclass(parent, QrankError) else None
        actual[name] = (shown, kind.exit_code)
    assert drawn == actual


def test_exit_codes_are_distinct_and_none_is_success() -> None:
    codes = [kind.exit_code for kind in KINDS.values()]
    assert len(set(codes)) == len(codes)
    assert min(codes) > 0


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_says_what_it_was_given(name: str) -> None:
    """Errors that are also built-in errors, such as KeyError, must not quote the message."""
    assert str(KINDS[name]("what to do")) == "what to do"


def test_the_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == qrank.__version__


def test_extras_exist_and_bring_their_modules() -> None:
    optional = PROJECT["project"]["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        """Names of distributions in an extra, including those of nested extras."""
        names: set[str] = set()
        for line in optional[extra]:
            name, inner = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", line).groups()  # type: ignore[union-attr]
            own = {name.replace("_", "-")}
            names |= set().union(*map(brought, inner.split(","))) if name == "qrank" else own
        return names

    needed = [*extras.EXTRA_OF.items()]
    for backend in map(spec, BACKENDS):
        needed += [(module, backend.extra) for module in backend.modules]
    # An environment of its own, which `make optimum` makes.
    needed.remove(("optimum", "optimum"))
    assert brought("optimum") == brought("convert") | {"nncf", "optimum-intel"}
    distributions = metadata.packages_distributions()
    for module, extra in needed:
        package = module.partition(".")[0]
        found = {name.replace("_", "-") for name in distributions[package]}
        assert found & brought(extra), f"qrank[{extra}] does not bring {module}"
    assert brought("cpu") == {"onnxruntime", "openvino"}, "the light runtimes"
    apart = {"browser-test", "docs", "install-test", "gpu", "optimum"}
    assert set().union(*map(brought, set(optional) - apart)) == brought("test")


def test_an_unknown_extra_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        extras.need("nowhere")


def test_every_package_on_disk_is_installed() -> None:
    settings = PROJECT["tool"]["setuptools"]
    places = {
        "qrank.__pyinstaller": "deploy/pyinstaller",
        "qrank.converters": "converters",
        "qrank.models": "models",
    }
    assert settings["package-dir"] == places
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("qrank/**/__init__.py")
    } | {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in places.items()
        for path in ROOT.glob(f"{folder}/**/__init__.py")
    }
    on_disk |= {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("haystack_integrations/**/__init__.py")
    }
    assert set(settings["packages"]) == on_disk


def test_the_command_is_installed() -> None:
    module, _, name = PROJECT["project"]["scripts"]["qrank"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
