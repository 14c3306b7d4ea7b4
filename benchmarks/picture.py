"""Draw the README's picture from stored results: speed of qrank and its alternatives.

    python benchmarks/picture.py benchmarks/results/CPU.json docs/speed.svg

Systems that rank about as well as the original are drawn; one that loses more than LOSS in nDCG@10
is left out, because its speed says nothing.
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
OURS, OTHERS, TEXT = "#c2410c", "#94a3b8", "#334155"


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
        content: of a file under `results/`.
    """
    (table, *_) = content["tables"]
    rows = {row["system"]: row for row in table["rows"]}
    least = rows[ORIGINAL]["nDCG@10"] - LOSS
    shown = [row for row in rows.values() if row["nDCG@10"] >= least]
    shown.sort(key=lambda row: row["pairs/s"])
    figure = Figure(figsize=(8, 0.6 + 0.34 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    names = [row["system"] for row in shown]
    speeds = [row["pairs/s"] for row in shown]
    colors = [OURS if name.startswith("qrank") else OTHERS for name in names]
    axes.barh(names, speeds, color=colors, height=0.68)
    slowest = rows[ORIGINAL]["pairs/s"]
    for place, (name, speed) in enumerate(zip(names, speeds, strict=True)):
        times = "" if name == ORIGINAL else f"  {speed / slowest:.1f} x"
        axes.text(speed, place, f" {speed:.1f}{times}", va="center", color=TEXT, fontsize=9)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=OURS if name.startswith("qrank") else TEXT, fontsize=9)
        label.set_fontweight("bold" if name.startswith("qrank") else "normal")
    axes.set_title(
        f"Pairs per second, the same model and documents, {content['threads']} threads of "
        f"{content['cpu']} ({content['instruction sets'][-1]})",
        fontsize=9.5,
        color=TEXT,
        loc="left",
    )
    axes.set_xlim(0, max(speeds) * 1.16)
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
