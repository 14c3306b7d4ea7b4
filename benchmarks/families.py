"""Every family in every format and precision: how close to its own reference.

Tiny random checkpoints of the tests are converted to everything that the family and this machine
can run. Random weights are harder on quantization than trained ones, so nothing is refused here:
the table shows what a conversion finds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import arguments, machine, tolerate_anything

from qrank.backends import formats
from qrank.bundle.manifest import Variant
from qrank.converters.checkpoint import minicpm
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import QrankError

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import oracles
import tiny
import tiny_chains
import tiny_decoders
import tiny_encoders
import tiny_rewritten
import tiny_t5

FAMILIES: dict[str, str] = {
    **tiny_decoders.FAMILIES,
    **tiny_encoders.FAMILIES,
    **{name: name for name in tiny_t5.LABELS},
    "qwen3.5": "qwen3-reranker",
}
"""Families that no config.json tells from others."""


def main() -> None:
    """Convert every kind and print a table for each format."""
    parser = arguments(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    asked = parser.parse_args()
    tolerate_anything()
    # The tiny one has as many layers.
    vars(minicpm)["LAYERS"] = oracles.LAYERS
    found: dict[str, dict[str, Variant]] = {}
    failed = 0
    with TemporaryDirectory() as temporary:
        for kind in asked.kinds:
            try:
                with redirect_stdout(sys.stderr):
                    found[kind] = _converted(kind, Path(temporary) / kind)
            except QrankError as error:
                failed += 1
                sys.stderr.write(f"{kind}: {error}\n")
    lines = [
        machine(),
        "",
        "Cells: max |Δlogit| as a share of the spread, Kendall's tau, nDCG@10.",
        "",
    ]
    for name, format in formats().items():
        lines += [*_table(name, list(format.made), found), ""]
    sys.stdout.write("\n".join(lines))
    sys.exit(failed > 0)


def _converted(kind: str, folder: Path) -> dict[str, Variant]:
    """Every variant that a kind of checkpoint can be converted to, by name."""
    source = str(CHECKPOINTS[kind](folder / "tiny"))
    family = FAMILIES.get(kind)
    card = read_checkpoint(source, family=family).card
    wanted = [
        (name, precision)
        for name, format in formats().items()
        for precision in format.made
        if name not in card.unsupported
    ]
    result = convert(source, wanted, folder / "bundle", family=family, min_agreement=-1)
    for name, error in result.failed.items():
        sys.stderr.write(f"{kind} {name}: {error}\n")
    return dict(result.manifest.variants)


def _table(format: str, precisions: list[str], found: dict[str, dict[str, Variant]]) -> list[str]:
    """The lines of a format's table; precisions that nothing was made in are left out."""
    made = [
        p for p in precisions if any(f"{format}-{p}" in variants for variants in found.values())
    ]
    if not made:
        return []
    lines = [f"| {format} | {' | '.join(made)} |", "|---" * (len(made) + 1) + "|"]
    for kind, variants in found.items():
        cells = [_cell(variants.get(f"{format}-{precision}")) for precision in made]
        if any(cells):
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _cell(variant: Variant | None) -> str:
    if variant is None:
        return ""
    fidelity, ranking = variant.fidelity, variant.ranking
    share = fidelity.max_abs / max(1.0, fidelity.spread)
    assert ranking is not None
    return f"{share:.2%} {fidelity.kendall:.3f} {ranking.ndcg:.4f}"


def _chain(kind: str, modules: list[str], **settings: Any) -> Callable[[Path], Path]:
    base = tiny.CHECKPOINTS[kind]

    def make(folder: Path) -> Path:
        return tiny_chains.chain(base(folder.with_name("base")), folder, modules, **settings).folder

    return make


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    **tiny.CHECKPOINTS,
    **tiny_encoders.CHECKPOINTS,
    **tiny_t5.CHECKPOINTS,
    "ettin": _chain("modernbert-mean", tiny_chains.ETTIN),
    "chain of bert": _chain("bert", tiny_chains.PLAIN, activation="Tanh", bias=True),
    "jina-reranker-v2": lambda folder: tiny_rewritten.jina_v2(
        tiny.xlm_roberta(folder.with_name("base")), folder
    ),
    "nemotron": tiny_rewritten.nemotron,
    **tiny_decoders.CHECKPOINTS,
    "minicpm": lambda folder: tiny_rewritten.minicpm(
        tiny_decoders.gemma(folder.with_name("base")), folder
    ),
    "qwen3-vl": tiny_rewritten.qwen3_vl,
    "qwen3.5": tiny_rewritten.qwen3_5,
}
"""Every kind of tiny checkpoint, and how it is made."""

if __name__ == "__main__":
    main()
