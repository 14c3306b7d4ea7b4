"""What a choice of runtimes costs and gives: installed size, start and speed of `mini`.

Each extra is installed from the wheel into a fresh environment. `qrank score` then ranks the 5 and
the 20 short documents of `make demo` in fresh processes that take turns; the model's files are in
the operating system's page cache. A first start finds an empty cache folder: it hashes the model,
checks it against the probes, and OpenVINO compiles it. Pairs per second are of requests with 20
synthetic documents of 128 tokens, by `qrank bench`, without starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import alternate, arguments, report
from install import build_wheel, install
from startup import QUERY, SAMPLE

EXTRAS = ("onnx", "openvino", "cpu")
COLUMNS = {
    "installed": "",
    "runs": "",
    "MB": ",.0f",
    "first start s": ".2f",
    "5 documents s": ".2f",
    "20 documents s": ".2f",
    "pairs/s": ",.0f",
}


def main() -> None:
    """Install, start and measure, and print the results."""
    parser = arguments(__doc__)
    parser.add_argument("--wheel", type=Path, help="this wheel instead of building one")
    parser.add_argument("--rounds", type=int, default=9, help="[default: %(default)s]")
    parser.add_argument("--seconds", type=int, default=5, help="of speed  [default: %(default)s]")
    parser.add_argument(
        "--environments", type=Path, help="keep the environments in this folder, or use them again"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.environments or Path(temporary)
        fewer = Path(temporary) / "5.txt"
        lines = SAMPLE.read_text("utf-8").splitlines()[:5]
        fewer.write_text("\n".join([*lines, ""]), "utf-8")
        wheel = options.wheel
        cases = {}
        for extra in EXTRAS:
            if not (folder / extra).exists():
                wheel = wheel or build_wheel(Path(temporary) / "dist")
                install(wheel, extra, folder / extra)
            cold, warm = (Path(temporary) / f"{extra}-{kind}" for kind in ("cold", "warm"))
            start = partial(_score, folder / extra)
            cases[extra, "first"] = partial(_first, start, cold, SAMPLE)
            cases[extra, "5"] = partial(start, warm, fewer)
            cases[extra, "20"] = partial(start, warm, SAMPLE)
        seconds = alternate(cases, options.rounds)
        rows = [_row(folder / extra, extra, seconds, options.seconds) for extra in EXTRAS]
    title = f"What each extra costs and gives: mini, {options.rounds} rounds"
    report(title, COLUMNS, rows, as_json=options.json)


def _score(environment: Path, cache: Path, documents: Path) -> None:
    _qrank(environment, cache, "score", "-q", QUERY, str(documents))


def _first(start: partial[None], cache: Path, documents: Path) -> None:
    start(cache, documents)
    shutil.rmtree(cache)


def _row(
    environment: Path, extra: str, seconds: dict[Any, list[float]], limit: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        ask = partial(_qrank, environment, Path(cache))
        target = json.loads(ask("score", "-q", QUERY, "-f", "json", str(SAMPLE)))["target"]
        targets = json.loads(ask("bench", "mini", "--seconds", str(limit), "--json"))["targets"]
        # Of its compute dtypes, the first is what runs untuned.
        found = next(row for row in targets if row["target"] == target and row["reason"] is None)
    (site,) = environment.glob("[Ll]ib/**/site-packages")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    return {
        "installed": f"qrank[{extra}]",
        "runs": target,
        "MB": size / 1e6,
        "first start s": median(seconds[extra, "first"]),
        "5 documents s": median(seconds[extra, "5"]),
        "20 documents s": median(seconds[extra, "20"]),
        "pairs/s": 20_000 / found["p50"]["20"],
    }


def _qrank(environment: Path, cache: Path, *arguments: str) -> str:
    variables = {**os.environ, "QRANK_CACHE": str(cache)}
    # An installed package has bytecode: the first round may write it for the others.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [environment / "bin" / "qrank", *arguments]
    done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


if __name__ == "__main__":
    main()
