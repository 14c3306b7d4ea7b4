"""Every command in the README does what the README says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qrank.backends.openvino import saturates

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BIN = Path(sys.executable).parent

NOT_RUN = {
    "make demo": "its command is run by test_demo, its installation by .ci/run",
    "make test": "this very test run",
    'pip install ".[cpu]"': "the environment is there already",
    'pip install ".[cpu,convert]"': "the environment is there already",
    'qrank score -m BAAI/bge-reranker-base -q "how do plants make food?" passages.txt': (
        "needs the hub; tests/test_hub_checkpoints.py runs it with a hub of its own"
    ),
    'pip install ".[cpu,eval]"': "the environment is there already",
    'pip install ".[openvino]"': "the environment is there already",
    'pip install ".[gguf]"': "the environment is there already",
    'pip install ".[cpu,serve]"': "the environment is there already",
    "qrank serve mini": "runs until it is stopped; tests/test_serve.py does",
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install ".[gguf]"': "compiles for a GPU",
}
if saturates():
    command = "qrank convert models/mini --to openvino --precision int8-w8a8"
    NOT_RUN[f"{command} --calibration pairs.jsonl -o my-bundle"] = "this CPU has no VNNI"


def blocks(language: str) -> list[str]:
    """The code blocks in a language; "" for those without a language."""
    # Match blocks in all languages, or an end would be taken for a start.
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for named, code in found if named == language]


def run(command: str, folder: Path) -> str:
    """Run a command in a shell that finds this environment's qrank first; return its output."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    passages = (ROOT / "docs/sample/passages.txt").read_text("utf-8")
    (folder / "passages.txt").write_text(passages, "utf-8")
    shutil.copytree(
        ROOT / "models/mini", folder / "models/mini", ignore=shutil.ignore_patterns("bundle")
    )
    lines = passages.splitlines()
    records = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(lines)]
    (folder / "documents.jsonl").write_text("\n".join(records), "utf-8")
    (folder / "queries.jsonl").write_text('{"id": "q1", "text": "what colour is Mars?"}', "utf-8")
    pairs = [json.dumps({"query": "how do plants make food?", "document": x}) for x in lines]
    (folder / "pairs.jsonl").write_text("\n".join(pairs), "utf-8")
    _write_scifact(folder / "scifact", lines)
    (folder / "first.trec").write_text(
        "".join(f"q1 Q0 d{i} {i + 1} {-i} bm25\n" for i in range(len(lines))), "utf-8"
    )
    return folder


def _write_scifact(folder: Path, documents: list[str]) -> None:
    """Write a collection in BEIR's layout: six questions, each answered by one passage."""
    asked = {
        "how do plants make food?": 1,
        "what colour is the planet Mars?": 8,
        "how is fresh pasta made?": 2,
        "why do bees carry pollen between flowers?": 7,
        "what do rabbits eat?": 19,
        "how do solar panels make electricity from sunlight?": 10,
    }
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", list(asked))):
        records = [
            json.dumps({"_id": f"{name}{i}", "title": "", "text": text})
            for i, text in enumerate(texts)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(records), "utf-8")
    rows = [f"queries{i}\tcorpus{place}\t1" for i, place in enumerate(asked.values())]
    text = "\n".join(["query-id\tcorpus-id\tscore", *rows])
    (folder / "qrels/test.tsv").write_text(text, "utf-8")


def test_shell_commands(folder: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert set(NOT_RUN) <= set(commands), "an exemption for a command that is not there"
    for command in commands:
        if command not in NOT_RUN:
            run(command, folder)
    first = (folder / "new.trec").read_text("utf-8").split()
    assert first[:4] == ["q1", "Q0", "d8", "1"]


def test_python(folder: Path) -> None:
    (block,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == "1"


def test_demo() -> None:
    """`make demo` runs this command and prints exactly what the README shows."""
    recipe = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (command,) = re.findall(r"^\.venv/bin/(qrank .*)$", recipe, re.MULTILINE)
    printed = run(command, ROOT)
    assert "photosynthesis" in printed.splitlines()[1]
    shown, told = (_without_scores(text) for text in (printed, blocks("")[0]))
    assert shown[0] == told[0]
    # Sums of int8 products differ slightly between CPUs.
    np.testing.assert_allclose(shown[1], told[1], atol=0.01)


def _without_scores(table: str) -> tuple[list[str], list[float]]:
    """Lines of the table with decimal numbers replaced by "#", and those numbers."""
    number = re.compile(r"\d+\.\d+")
    lines = [number.sub("#", line.rstrip()) for line in table.splitlines()]
    return lines, [float(found) for found in number.findall(table)]


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
