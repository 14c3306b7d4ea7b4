"""The table of record: qrank and its alternatives on this machine, stored as JSON.

Converts `mini` to every variant, tunes it, and compares it with all peers (`vs_peers.py`); then
compares random weights at the sizes of real rerankers with sentence-transformers (`real_size.py`).
Results are stored under `results/`, one file for each kind of CPU, as soon as a part is done;
`picture.py` draws them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import arguments

from qrank.system.machine import cpu_name, instruction_sets, processors

HERE = Path(__file__).parent
SIZES = (
    "MiniLM-L6",
    "MiniLM-L12",
    "gte-reranker-modernbert-base",
    "ettin-reranker-150m",
    "bge-reranker-v2-m3",
)
MINI = {"onnx": ("int8",), "openvino": ("int8", "fp16", "int8-w8a8"), "gguf": ("q8_0", "q4_k_m")}
VARIANTS = ("onnx-int8", "openvino-int8", "openvino-fp16", "openvino-int8-w8a8", "gguf-q8_0")


def main() -> None:
    """Run everything, print the tables, and store the results."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("--openvino-python", type=Path, required=True, help="see README.md")
    parser.add_argument("--onnx-python", type=Path, required=True, help="see README.md")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, help="of the sizes")
    parser.add_argument("--documents", type=int, default=40, help="of Cranfield, for mini")
    parser.add_argument("--queries", type=int, default=5, help="judged, for mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-mini", action="store_true", help="sizes alone")
    parser.add_argument("--work", type=Path, help="folder to keep checkpoints and bundles in")
    options = parser.parse_args()
    path = HERE / "results" / f"{_slug(cpu_name(), instruction_sets()[-1])}.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if not options.no_mini:
            _store(path, options, list(_mini(options, work)))
        for size in options.sizes:
            given = ["--shapes", size, "--variants", *options.variants, "--short"]
            given += ["--peer-python", str(options.openvino_python), "--work", str(work)]
            given += ["--rounds", str(options.rounds)]
            _store(path, options, list(_tables("real_size.py", *given)))
    sys.stderr.write(f"{path}\n")


def _store(path: Path, options: Any, tables: list[dict[str, Any]]) -> None:
    """Write the results so far; tables of earlier runs stay, but for those with these titles."""
    earlier = json.loads(path.read_text("utf-8"))["tables"] if path.exists() else []
    today = datetime.now(UTC).date().isoformat()
    new = [{"date": today, **table} for table in tables if table["rows"]]
    titles = [table["title"] for table in new]
    content = {
        "cpu": cpu_name(),
        "instruction sets": instruction_sets(),
        "threads": processors(),
        "versions": _versions(options),
        "tables": new + [table for table in earlier if table["title"] not in titles],
    }
    # mini's first, which the picture shows.
    content["tables"].sort(key=lambda table: not table["title"].startswith("mini"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _mini(options: Any, work: Path) -> Iterator[dict[str, Any]]:
    """mini in every variant, compared with all peers."""
    checkpoint, bundle = HERE.parent / "models" / "mini", work / "mini"
    for format, precisions in MINI.items():
        named = [word for precision in precisions for word in ("--precision", precision)]
        given = ["--to", format, *named, "-o", bundle, "--min-agreement", "-1"]
        _run("-m", "qrank", "convert", checkpoint, *given)
    _run("-m", "qrank", "tune", bundle)
    yield from _tables(
        "vs_peers.py",
        *map(str, (checkpoint, bundle, "--data", options.data)),
        *("--openvino-python", str(options.openvino_python)),
        *("--onnx-python", str(options.onnx_python)),
        *("--documents", str(options.documents), "--queries", str(options.queries)),
        *("--rounds", str(options.rounds)),
    )


def _tables(script: str, *given: str) -> list[dict[str, Any]]:
    """The tables that a script prints as JSON, one after the other."""
    text = _run(str(HERE / script), *given, "--json")
    decoder, tables, place = json.JSONDecoder(), [], 0
    while (place := text.find("{", place)) >= 0:
        table, place = decoder.raw_decode(text, place)
        tables.append(table)
        sys.stdout.write(f"{json.dumps(table)}\n")
    return tables


def _run(*command: object) -> str:
    return subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _versions(options: Any) -> dict[str, list[str]]:
    """What the three environments have installed that takes part."""
    wanted = re.compile(
        "(fastembed|flashrank|llama.cpp.python|onnxruntime|openvino|optimum.*|sentence.transformers"
        "|torch|transformers|qrank)==",
        re.IGNORECASE,
    )
    pythons = {"qrank": sys.executable, "OpenVINO's peers": options.openvino_python}
    pythons["ONNX's peers"] = options.onnx_python
    found = {}
    for name, python in pythons.items():
        command = [str(python), "-m", "pip", "list", "--format", "freeze"]
        lines = subprocess.check_output(command, text=True).splitlines()
        found[name] = [line for line in lines if wanted.match(line)]
    return found


def _slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


if __name__ == "__main__":
    main()
