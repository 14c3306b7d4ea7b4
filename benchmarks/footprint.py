"""What ranking with `mini` takes on a small device: disk, memory and the time of a start.

Each row is an environment of its own, made from a wheel: `least` has only what scoring imports, and
no command; `onnx` and `openvino` are the extras; the last two are the `onnx` environment frozen by
PyInstaller, into a folder and into one file. A start is a process from its begin to its end, which
ranks 20 short documents; the first one finds an empty cache folder, which adds the proof, and with
it the longest probe.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from common import alternate, arguments, report
from install import build_wheel

ROOT = Path(__file__).parent.parent
LEAST = ("numpy", "onnxruntime", "platformdirs", "tokenizers")
RANK = """
import json, sys
from qrank import Reranker
from qrank.system.machine import peak_memory
backend, texts = sys.argv[1:]
with open(texts, encoding="utf-8") as file:
    documents = file.read().splitlines()
with Reranker("mini", backend=backend) as reranker:
    best = reranker.rank("how do plants make food?", documents)[0]
print(json.dumps({"score": best.score, "peak": peak_memory()}))
"""
COLUMNS = {
    "what": "",
    "disk MB": ",.0f",
    "first peak MB": ",.0f",
    "later peak MB": ",.0f",
    "first s": ".2f",
    "later s": ".2f",
    "score": ".4f",
}


def main() -> None:
    """Make the environments, then time starts in turns."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="[default: %(default)s]")
    parser.add_argument(
        "--folder", type=Path, help="keeps the environments: what it has is not made again"
    )
    parser.add_argument("--prepare", action="store_true", help="only make the environments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        made = options.folder or Path(temporary)
        cases = _environments(made)
        if options.prepare:
            return
        starts = {
            name: [*command, "openvino" if name == "openvino" else "onnx"]
            for name, (command, _) in cases.items()
        }
        told: dict[tuple[str, bool], dict[str, float]] = {}

        def start(name: str, *, first: bool) -> None:
            cache = Path(temporary) / f"cache-{name}-{first}"
            told[name, first] = _start(starts[name], cache)
            if first:
                shutil.rmtree(cache)

        seconds = alternate(
            {
                (name, first): partial(start, name, first=first)
                for name in cases
                for first in (True, False)
            },
            options.rounds,
        )
    rows = [
        {
            "what": name,
            "disk MB": size / 1e6,
            "first peak MB": told[name, True]["peak"] / 1e6,
            "later peak MB": told[name, False]["peak"] / 1e6,
            "first s": median(seconds[name, True]),
            "later s": median(seconds[name, False]),
            "score": told[name, False]["score"],
        }
        for name, (_, size) in cases.items()
    ]
    report("Footprint: ranking 20 short documents", COLUMNS, rows, as_json=options.json)


def _environments(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Each environment's command that ranks, and its size in bytes, made if they are not there."""
    script = folder / "rank.py"
    folder.mkdir(parents=True, exist_ok=True)
    script.write_text(RANK, "utf-8")
    if not list((folder / "dist").glob("*.whl")):
        build_wheel(folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    wanted = {
        "least": [str(wheel), *LEAST, "--no-deps"],
        "onnx": [f"{wheel}[onnx]"],
        "openvino": [f"{wheel}[openvino]"],
    }
    found = {}
    for name, packages in wanted.items():
        python = folder / f"with-{name}/bin/python"
        if not python.exists():
            _run(sys.executable, "-m", "venv", "--without-pip", folder / f"with-{name}")
            pip: list[str | Path] = [
                sys.executable,
                "-m",
                "pip",
                "--python",
                python,
                "--disable-pip-version-check",
            ]
            _run(*pip, "install", "--quiet", *packages)
        (site,) = (folder / f"with-{name}").glob("lib/*/site-packages")
        found[name] = ([str(python), str(script)], _bytes(site))
    freezer = folder / "freezer"
    if not freezer.exists():
        # A copy, since PyInstaller would count in the size of the other.
        _run(sys.executable, "-m", "venv", freezer)
        _run(freezer / "bin/pip", "install", "--quiet", f"{wheel}[onnx]", "pyinstaller>=6.10")
    for form in ("onedir", "onefile"):
        out = folder / f"frozen-{form}"
        if not out.exists():
            places: list[str | Path] = [
                "--distpath",
                out,
                "--workpath",
                folder / "work",
                "--specpath",
                folder,
            ]
            freeze = [freezer / "bin/pyinstaller", "--noconfirm", "--log-level", "ERROR"]
            _run(*freeze, f"--{form}", *places, script)
        app = out / "rank" if form == "onefile" else out / "rank/rank"
        found[f"frozen, {form}"] = ([str(app)], _bytes(out))
    return found


def _start(command: list[str], cache: Path) -> dict[str, float]:
    environment = {**os.environ, "QRANK_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    texts = str(ROOT / "docs/sample/passages.txt")
    done = subprocess.run(
        [*command, texts], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
