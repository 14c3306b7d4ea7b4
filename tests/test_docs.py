"""The documentation does what it says: its code runs, and its links lead somewhere."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import subset
from doc_blocks import (
    PAGES,
    ROOT,
    RUN,
    SHOWN,
    Block,
    anchors,
    blocks,
    lines,
    plain_words,
    without_code,
)
from hub_server import Hub

from qrank.cli import main
from qrank.system import paths

HUB = ("BAAI/bge-reranker-base",)
"""Models of the hub that blocks name; a tiny checkpoint stands for each."""

VARIANTS = ["onnx-int8", "onnx-fp16", "onnx-fp32"]
"""Of `my-bundle`, which stands for one that the reader has made."""

ELSEWHERE = {
    "docs/export.md": "ends with an upload; tests/test_export.py runs the command",
    "docs/integrations.md": "parts of programs, which tests/test_recipes.py and others run",
    "docs/serve.md": "runs until it is stopped; tests/test_serve.py and others do",
}
"""Pages none of whose blocks run, and why."""


def reason(page: str, block: Block) -> str:
    """Why a block is not run; "" if it is."""
    return block.reason or ELSEWHERE.get(page, "")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all pages, and none of its results for other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        paths.cache_folder.cache_clear()
        yield
    paths.cache_folder.cache_clear()


@pytest.fixture
def folder(
    server: Hub,
    bert: str,
    bundle: Path,
    ready_graph: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The reader's folder: the files that blocks name, tiny models, and a hub that has them.

    Conversions of it are quick: a ready graph replaces the exporter, and ONNX is the only format
    whose packages are installed.
    """
    missing = ("openvino", "nncf", "gguf", "llama_cpp", "mlx.core")
    installed = "qrank.converters.makers.installed"
    monkeypatch.setattr(installed, lambda name: name not in missing)
    for name in HUB:
        server.push(name, Path(bert))
    folder = tmp_path / "reader"
    shutil.copytree(bert, folder / "models/mini")
    subset(bundle, folder / "my-bundle", VARIANTS)
    texts = (ROOT / "docs/sample/passages.txt").read_text("utf-8").splitlines()
    asked = {
        "how do plants make food?": 1,
        "what colour is the planet Mars?": 8,
        "how is fresh pasta made?": 2,
        "why do bees carry pollen between flowers?": 7,
        "what do rabbits eat?": 19,
        "how do solar panels make electricity from sunlight?": 10,
    }
    for name in ("passages.txt", "notes.txt", "docs/sample/passages.txt"):
        _write(folder / name, texts)
    _write(folder / "documents.jsonl", _records("d", texts, "id"))
    _write(folder / "queries.jsonl", _records("q", list(asked), "id"))
    (folder / "in").mkdir()
    table = pa.table({"query": [*asked][:2], "text": texts[:2]})
    pq.write_table(table, folder / "in/a.parquet")
    _write(folder / "scifact/corpus.jsonl", _records("d", texts, "_id"))
    _write(folder / "scifact/queries.jsonl", _records("q", list(asked), "_id"))
    rows = [f"q{i}\td{place}\t1" for i, place in enumerate(asked.values())]
    _write(folder / "scifact/qrels/test.tsv", ["query-id\tcorpus-id\tscore", *rows])
    run = [f"q{q} Q0 d{d} {d + 1} {-d} bm25" for q in range(len(asked)) for d in range(5)]
    _write(folder / "first.trec", run)
    monkeypatch.chdir(folder)
    return folder


def _write(path: Path, written: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*written, ""]), "utf-8")


def _records(letter: str, texts: list[str], key: str) -> list[str]:
    return [json.dumps({key: f"{letter}{i}", "text": text}) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in RUN for b in blocks(page))]
)
def test_blocks_run(page: str, request: pytest.FixtureRequest) -> None:
    todo = [block for block in blocks(page) if block.language in RUN]
    if any(_starts_something(block) for block in todo if not reason(page, block)):
        folder = request.getfixturevalue("folder")
        if any("-o my-bundle" in b.code for b in todo if not reason(page, b)):
            shutil.rmtree(folder / "my-bundle")  # the page makes it
    names: dict[str, object] = {"__name__": "__main__"}
    for block in todo:
        if reason(page, block):
            for line in [] if block.language == "python" else lines(block):
                check(line, block.place)
        elif block.language == "python":
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                exec(compile(block.code, block.place, "exec"), names)
            compare(block, told.getvalue())
        else:
            compare(block, "".join(run(line, block.place) for line in lines(block)))


def _starts_something(block: Block) -> bool:
    return block.language == "python" or any("qrank " in line for line in lines(block))


def check(line: str, place: str) -> bool:
    """Check what can be known of a command without running it.

    Returns:
        Whether that is all there is to do: the command installs, or is one of the Makefile's.
    """
    if re.search(r"\bpip (install|wheel|download)\b", line):
        return True
    words = plain_words(line)
    if words and words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert words[1] in targets, f"{place}: {line}"
        return True
    if words and words[0] == "qrank":
        assert words[1] in main.commands, f"{place}: {line}"
        command = main.commands[words[1]]
        parser = command.make_parser(click.Context(command))
        try:
            parser.parse_args(words[2:])
        except click.UsageError as error:
            pytest.fail(f"{place}: {line}: {error.format_message()}")
    return False


def run(line: str, place: str) -> str:
    """Run a command and return its output: qrank's in this process, others in a shell."""
    if check(line, place):
        return ""
    words = plain_words(line)
    if words and words[0] == "qrank":
        done = CliRunner(env={"COLUMNS": "80"}).invoke(main, words[1:])
        assert done.exit_code == 0, f"{place}: {line}\n{done.output}"
        return done.stdout
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert shell.returncode == 0, f"{place}: {line}\n{shell.stderr}"
    return shell.stdout


def compare(block: Block, printed: str) -> None:
    """Compare with the output that the page shows, if it shows one."""
    shown = block.output
    if block.language == "console":
        shown = "".join(f"{x}\n" for x in block.code.splitlines() if not x.startswith("$ "))
    if shown is None:
        return
    (text, numbers), (expected, known) = _without_numbers(printed), _without_numbers(shown)
    assert text == expected, f"{block.place} prints\n{printed}"
    # OpenVINO computes in bf16 where the CPU does, and sums of int8 products differ between CPUs.
    np.testing.assert_allclose(numbers, known, atol=0.05, err_msg=block.place)


def _without_numbers(printed: str) -> tuple[list[str], list[float]]:
    """Lines with decimal numbers replaced by "#", and those numbers."""
    number = re.compile(r"\d+\.\d+")
    text = [number.sub("#", line.rstrip()) for line in printed.strip().splitlines()]
    return text, [float(found) for found in number.findall(printed)]


def test_the_demo_prints_what_the_readme_shows() -> None:
    recipe = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = re.findall(r"^\.venv/bin/(qrank .*)$", recipe, re.MULTILINE)
    with contextlib.chdir(ROOT):
        printed = run(line, "Makefile")
    shown = next(block for block in blocks("README.md") if block.language == "")
    assert "photosynthesis" in printed.splitlines()[1]
    compare(Block("README.md", "sh", line, "", shown.code), printed)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_known_language(page: str) -> None:
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN), f"{block.place}: {block.language}"


@pytest.mark.parametrize("page", PAGES)
def test_extras_and_commands_in_the_text_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extras in re.findall(r'"?(?:\.|qrank)\[([a-z,-]+)\]', text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), f"{page}: {extras}"
    for line in re.findall(r"`(qrank [a-z][^`\n]*)`", text):
        check(line, page)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", without_code(page)):
        if "://" in target:
            continue
        place = (ROOT / page).parent / target if target else ROOT / page
        assert place.is_file(), f"{page}: {target}"
        if anchor and place.name not in ("api.md", "cli.md"):
            name = place.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page}: {target}#{anchor}"
