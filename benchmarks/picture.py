"""Draw the README's picture from stored results: speed of qrank and its alternatives.

    python benchmarks/picture.py benchmarks/results/CPU.json docs/speed.svg

Of qrank, the target that it chooses by itself is drawn. Systems that rank about as well as the
original are drawn; one that loses more than LOSS in nDCG@10 is left out, because its speed says
nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LOSS = 0.02
ORIGINAL = "sentence-transformers, fp32"
CHOSEN = "qrank, chosen: "
OURS, OTHERS, TEXT = "#d9622b", "#94a3b8", "#768390"
"""Colours that can be read on white and on black: the ground is transparent."""


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    content = json.loads(options.results.read_text("utf-8"))
    # The same file from the same results.
    matplotlib.rcParams["svg.hashsalt"] = "qrank"
    draw(content).savefig(options.picture, metadata={"Date": None})


def draw(content: dict[str, Any]) -> Figure:
    """A bar for each system of the first table, the fastest at the top.

    Args:
        content: of a file under `results/`, as `record.py` writes it.
    """
    table = content["tables"][0]
    rows = {row["system"]: row for row in table["rows"]}
    least = rows[ORIGINAL]["nDCG@10"] - LOSS
    shown = [
        row
        for name, row in rows.items()
        if row["nDCG@10"] >= least and (name.startswith(CHOSEN) or not name.startswith("qrank"))
    ]
    shown.sort(key=lambda row: row["pairs/s"])
    names = [_label(row["system"]) for row in shown]
    speeds = [row["pairs/s"] for row in shown]
    figure = Figure(figsize=(7.5, 1.0 + 0.36 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, speeds, color=[_color(name) for name in names], height=0.68)
    slowest = rows[ORIGINAL]["pairs/s"]
    for place, (name, speed) in enumerate(zip(names, speeds, strict=True)):
        times = "" if name == ORIGINAL else f"  ({speed / slowest:.1f} x)"
        axes.text(speed, place, f" {speed:.1f}{times}", va="center", color=TEXT, fontsize=11)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        ours = name.startswith("qrank")
        label.set(color=OURS if ours else TEXT, fontsize=11, weight="bold" if ours else "normal")
    sets = content["instruction sets"]
    name = content["cpu"].replace("(R)", "").replace("(TM)", "")
    cpu = f"{name} ({sets[-1]})" if sets else name
    model = table["title"].partition(":")[0]
    figure.suptitle(
        f"Pairs per second: {model}, texts of uneven length\n{content['threads']} threads of {cpu}",
        fontsize=11,
        color=TEXT,
        x=0.01,
        ha="left",
    )
    axes.set_xlim(0, max(speeds) * 1.2)
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure


def _label(system: str) -> str:
    """A system's name; of qrank's choice, the variant."""
    if not system.startswith(CHOSEN):
        return system
    return f"qrank ({system.removeprefix(CHOSEN).partition('@')[0]})"


def _color(name: str) -> str:
    return OURS if name.startswith("qrank") else OTHERS


if __name__ == "__main__":
    main()
