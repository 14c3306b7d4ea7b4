"""Size of a fresh installation of `qrank[cpu]`, or another extra, from its wheel, by package.

pip runs outside the environment and installs into it, so the sum does not include pip; it does
include compiled bytecode. The wheel is built unless one is named.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from common import arguments, report

COLUMNS = {"package": "", "version": "", "MB": ",.1f", "share": ".1%"}


def main() -> None:
    """Build, install, and measure sizes."""
    parser = arguments(__doc__)
    parser.add_argument("--extra", default="cpu", help="[default: %(default)s]")
    parser.add_argument("--wheel", type=Path, help="this wheel instead of building one")
    parser.add_argument("--top", type=int, default=8, help="packages named  [default: %(default)s]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = options.wheel or build_wheel(folder / "dist")
        site = install(wheel, options.extra, folder / "venv")
        sizes = {path: path.stat().st_size for path in site.rglob("*") if path.is_file()}
        rows: list[dict[str, Any]] = []
        for package in metadata.distributions(path=[str(site)]):
            files = {Path(str(package.locate_file(f))).resolve() for f in package.files or ()}
            size = sum(sizes.get(path, 0) for path in files)
            rows.append({"package": package.name, "version": package.version, "MB": size / 1e6})
        mini = sum(size for path, size in sizes.items() if "/models/mini/" in path.as_posix())
        total = sum(sizes.values()) / 1e6
    rows.sort(key=lambda row: -row["MB"])
    rest = rows[options.top :]
    named = rows[: options.top]
    if rest:
        mb = sum(row["MB"] for row in rest)
        named.append({"package": f"{len(rest)} others", "version": "", "MB": mb})
    named.append({"package": "total", "version": "", "MB": total})
    named.append({"package": "  of which mini's bundle", "version": "", "MB": mini / 1e6})
    for row in named:
        row["share"] = row["MB"] / total
    report(f"Installed size of qrank[{options.extra}]", COLUMNS, named, as_json=options.json)


def install(wheel: Path, extra: str, environment: Path) -> Path:
    """Install a wheel with an extra into a new environment, and return its site-packages."""
    _run("-m", "venv", "--without-pip", str(environment))
    pip = ("-m", "pip", "--python", str(environment), "--disable-pip-version-check")
    _run(*pip, "install", "--quiet", f"{wheel.resolve()}[{extra}]")
    (site,) = environment.glob("[Ll]ib/**/site-packages")
    return site


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout into a folder."""
    root = Path(__file__).parent.parent
    _run("-m", "build", "--wheel", "--outdir", str(folder), str(root))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
