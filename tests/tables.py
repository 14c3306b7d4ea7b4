"""The tables in the documentation that are generated from what the backends declare.

`python tests/tables.py` prints them; `test_tables.py` checks that the documentation has them.
"""

from __future__ import annotations

from qrank.backends import BACKENDS, format_of, formats, spec
from qrank.bundle.fidelity import Tolerance


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


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


TABLES = {"docs/hardware.md": formats_table, "docs/bundle.md": tolerance_table}

if __name__ == "__main__":
    for path, table in TABLES.items():
        print(path, *table(), "", sep="\n")  # noqa: T201
