"""The tables in the documentation that are generated.

They are made from what the backends declare, and from the reports of `qrank doctor --report` in
docs/reports.

`python tests/tables.py` prints them; `test_tables.py` checks that the documentation has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrank.backends import BACKENDS, format_of, formats, spec
from qrank.bundle.fidelity import Tolerance
from qrank.measure.report import SCHEMA, TargetReport

REPORTS = Path(__file__).parent.parent / "docs" / "reports"


def tolerances() -> dict[str, Tolerance]:
    """Precision -> tolerance, over all formats."""
    found: dict[str, Tolerance] = {}
    for name in BACKENDS:
        format = format_of(name)
        assert format is not None
        for precision in format.precisions:
            known = found.setdefault(precision.name, precision.tolerance)
            assert known == precision.tolerance, f"{precision.name} has two tolerances"
    return found


def formats_table() -> list[str]:
    """docs/hardware.md: the variants that can be made, and where they run."""
    heads = ["`--to`", "`--precision`, the default first", "`--device` besides `cpu`", "extra"]
    lines = [f"| {' | '.join(heads)} to run it |", "|---|---|---|---|"]
    for name, format in formats().items():
        backend = spec(name)
        kinds = [kind for kind in backend.kinds if kind != "cpu"]
        lines.append(
            f"| `{name}` | {_code(format.made)} | {_code(kinds)} | {_code([backend.extra])} |"
        )
    return lines


def tolerance_table() -> list[str]:
    """docs/bundle.md: how far a conversion's logits may deviate."""
    lines = ["| precision | max_abs | Kendall's tau |", "|---|---|---|"]
    known = tolerances()
    for bar in sorted(set(known.values()), key=lambda bar: bar.share):
        names = ", ".join(name for name, own in known.items() if own == bar)
        kendall = f" at least {bar.kendall:g} " if bar.kendall > -1 else " "
        lines.append(f"| {names} | {bar.share:g} s |{kendall}|")
    return lines


def verified_table(folder: Path = REPORTS) -> list[str]:
    """docs/hardware.md: what each target that was there did with the probes, by report."""
    heads = ["target", "computes in", "max Δlogit", "allowed", "tau", "machine"]
    lines = [f"| {' | '.join(heads)} | runtime | model | date |", f"|{'---|' * 9}"]
    rows = [
        (target.target, report["date"], _row(report, target)) for report, target in _tried(folder)
    ]
    return [*lines, *(row for *_, row in sorted(rows, key=lambda row: row[:2]))]


def unverified(folder: Path = REPORTS) -> list[str]:
    """docs/hardware.md: the targets that no report has."""
    tried = {target.target.rpartition("/")[2] for _, target in _tried(folder)}
    lines = []
    for name, format in formats().items():
        for kind in spec(name).kinds:
            missing = [p for p in format.made if f"{name}-{p}@{kind}" not in tried]
            if missing:
                which = "any precision" if missing == format.made else _code(missing)
                lines.append(f"- `{name}` on `{kind}`: {which}")
    return lines


def _tried(folder: Path) -> Iterator[tuple[dict[str, Any], TargetReport]]:
    """Each report with each of its targets whose runtime and device were there."""
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text("utf-8"))
        assert report["schema"] == SCHEMA, f"{path}: schema {report['schema']}, not {SCHEMA}"
        for each in report["targets"]:
            target = TargetReport(**each)
            if target.result != "absent":
                yield report, target


def _row(report: dict[str, Any], target: TargetReport) -> str:
    machine = report["machine"]
    system, *_, processor = machine["system"].split()
    sets = machine["instruction_sets"]
    where = f"{machine['cpu']}{f' ({sets[-1]})' if sets else ''}, {system} {processor}"
    if emulator := machine.get("emulator"):  # added by tests/arm.py
        where += f", emulated by {emulator}"
    runtime, _, version = (target.runtime or "").partition(" ")
    cells = [f"`{target.target}`", target.compute_dtype or ""]
    if target.result == "conforms":
        cells += [f"{target.max_abs:.3g}", f"{target.allowed:.3g}", f"{target.kendall:.3f}"]
    else:
        cells += [f"fails: {target.reason}".replace("|", "&#124;"), "", ""]
    model = report["model"]["name"]
    cells += [where, f"{runtime} {version.partition('-')[0]}", model, report["date"]]
    return f"| {' | '.join(cells)} |"


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


TABLES = {
    "formats": ("docs/hardware.md", formats_table),
    "verified": ("docs/hardware.md", verified_table),
    "unverified": ("docs/hardware.md", unverified),
    "tolerances": ("docs/bundle.md", tolerance_table),
}
"""Name -> the page, and what makes the table."""

if __name__ == "__main__":
    for path, table in TABLES.values():
        print(path, *table(), "", sep="\n")  # noqa: T201
