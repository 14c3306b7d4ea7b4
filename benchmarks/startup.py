"""Time to import qrank, and from the start of `qrank score` to its printed result.

Imports are compared with numpy's in pairs of fresh processes that take turns; the median of the
differences counts. `qrank score` reads the 20 short documents of `make demo`; its first start
finds an empty cache folder (it hashes the model and runs the probes), later starts a filled one. In
both cases the model's files are in the operating system's page cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from common import alternate, arguments, report

from qrank.bundle.locate import DEFAULT

SAMPLE = Path(__file__).parent.parent / "docs" / "sample" / "passages.txt"
QUERY = "how do plants make food?"
COLUMNS = {"what": "", "median s": ".3f", "fastest s": ".3f", "bar s": ".2f", "met": ""}


def main() -> None:
    """Time fresh processes and print the results."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=21, help="[default: %(default)s]")
    options = parser.parse_args()
    script = Path(sys.executable).with_name("qrank")
    command = [str(script), "score", "--model", options.model, "-q", QUERY, str(SAMPLE)]

    with tempfile.TemporaryDirectory() as folder:

        def first() -> None:
            cache = Path(folder) / "cold"
            _run(command, cache)
            shutil.rmtree(cache)

        warm = Path(folder) / "warm"
        seconds = alternate(
            {
                "nothing": lambda: _run([sys.executable, "-c", ""], warm),
                "numpy": lambda: _run([sys.executable, "-c", "import numpy"], warm),
                "qrank": lambda: _run([sys.executable, "-c", "from qrank import Reranker"], warm),
                "later": lambda: _run(command, warm),
                "first": first,
            },
            options.rounds,
        )
    added = (np.array(seconds["qrank"]) - np.array(seconds["numpy"])).tolist()
    rows = [
        _row("Python alone", seconds["nothing"]),
        _row("import numpy, with Python", seconds["numpy"]),
        _row("import qrank, beyond numpy", added, 0.05),
        _row("qrank score, first start", seconds["first"]),
        _row("qrank score, later starts", seconds["later"], 1.0),
    ]
    title = f"Starting: {options.model}, 20 short documents, {options.rounds} rounds"
    report(title, COLUMNS, rows, as_json=options.json)


def _row(what: str, seconds: list[float], bar: float | None = None) -> dict[str, object]:
    middle = median(seconds)
    met = None if bar is None else "yes" if middle < bar else "no"
    return {"what": what, "median s": middle, "fastest s": min(seconds), "bar s": bar, "met": met}


def _run(command: list[str], cache: Path) -> None:
    environment = {**os.environ, "QRANK_CACHE": str(cache)}
    # An installed package has bytecode: the first round may write it for the others.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
