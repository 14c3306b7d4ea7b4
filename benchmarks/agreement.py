"""Agreement of rankings at conversion compared with the nDCG@10 lost on judged queries.

Two kinds of points: the variants of a bundle, and the checkpoint itself with its weights rounded to
a few bits, in torch. Each has its agreement on qrank's own queries, as `qrank convert` computes it,
and its loss on a sample of the collection.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, report

from qrank.bundle.agreement import Agreement
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Logits, Sequences, padded
from qrank.converters.checkpoint.ids import encode_pairs
from qrank.converters.checkpoint.probes import calibration_pairs
from qrank.converters.checkpoint.ranking import ranking_data
from qrank.converters.checkpoint.read import Checkpoint, read_checkpoint
from qrank.quality.collection import Collection
from qrank.quality.metrics import MAIN, Difference, kendall, measure

POINTS = (
    *("row 4", "tensor 8", "activations 8", "row 5", "tensor 6", "row 6", "tensor 7", "row 8"),
    *("tensor 5", "activations 7", "row 7", "row 3"),
)
"""How weights are rounded: one scale for each row or for the whole matrix, and the bits. With
"activations", rows of weights have 8 bits and every matrix's input has one scale for all, from the
largest value on the calibration pairs, as in static quantization."""

COLUMNS = {
    "what": "",
    "tau": ".3f",
    "top 10": ".1%",
    "nDCG": ".4f",
    "nDCG@10 lost": "+.4f",
    "±": ".4f",
    "tau there": ".3f",
}

_BATCH = 16


def main() -> None:
    """Measure every point, print them and draw the plot."""
    parser = arguments(__doc__, on_data=True)
    parser.add_argument("checkpoint", type=Path, help="folder of an encoder's checkpoint")
    parser.add_argument("--bundle", type=Path, help="a bundle made from it, for its variants")
    parser.add_argument(
        "--loss", nargs="*", default=[], metavar="VARIANT=LOSS", help="from qrank eval"
    )
    parser.add_argument("--points", nargs="*", default=list(POINTS))
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="length that pairs are cut to")
    parser.add_argument("--keep", type=Path, help="file of points measured before; continued")
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.keep and options.keep.exists():
        rows = json.loads(options.keep.read_text("utf-8"))
    known = {row["what"] for row in rows}
    if wanted := [point for point in options.points if point not in known]:
        for row in _rounded(options, wanted):
            rows.append(row)
            sys.stderr.write(f"{row}\n")
            if options.keep:
                options.keep.write_text(json.dumps(rows, indent=1), "utf-8")
    if options.bundle:
        losses = dict(item.split("=") for item in options.loss)
        rows = [*_variants(options.bundle, losses), *rows]
    sample = f"{options.queries} queries x {options.candidates}, {options.tokens} tokens"
    rows.sort(key=lambda row: -float(row["nDCG"]))
    report(f"Agreement and loss: {sample}", COLUMNS, rows, as_json=options.json)
    if options.plot:
        _draw(rows, options.plot)


def _variants(folder: Path, losses: dict[str, str]) -> Iterator[dict[str, Any]]:
    for variant in Manifest.load(folder).variants.values():
        if variant.ranking is not None:
            row = {**_row(variant.name, variant.ranking), "kind": "variant"}
            if variant.name in losses:
                row["nDCG@10 lost"] = float(losses[variant.name])
            yield row


def _row(what: str, found: Agreement) -> dict[str, Any]:
    return {"what": what, "tau": found.kendall, "top 10": found.top10, "nDCG": found.ndcg}


def _rounded(options: Any, points: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Points of the rounded checkpoint."""
    checkpoint = read_checkpoint(str(options.checkpoint))
    tokenizer = json.dumps(checkpoint.text_tokenizer(), ensure_ascii=False)
    family = checkpoint.family
    works = _readable(checkpoint, tokenizer)
    model = checkpoint.load()
    model.eval()
    with closing(Collection.read(options.data)) as collection:
        run = collection.bm25(options.candidates, options.queries)
        run = {query: found for query, found in run.items() if len(found) > 1}
        pairs = {
            query: [(collection.queries[query], collection.documents[name]) for name in found]
            for query, found in run.items()
        }
        judged = [
            _cut(encode_pairs(each, tokenizer, family), options.tokens) for each in pairs.values()
        ]
        qrels = collection.qrels
    tried = encode_pairs(calibration_pairs(), tokenizer, family)
    theirs, there = _scored(model, works), dict(zip(run, _scored(model, judged), strict=True))
    base = _ndcg(qrels, run, there)
    for point in points:
        with _rounding(deepcopy(model), point, tried) as rounded:
            ours = _scored(rounded, works)
            here = dict(zip(run, _scored(rounded, judged), strict=True))
        lost = Difference.of(base, _ndcg(qrels, run, here))
        yield {
            **_row(point, Agreement.of(ours, theirs)),
            "nDCG@10 lost": lost.mean,
            "±": lost.margin,
            "tau there": kendall(here, there),
            "kind": "rounded",
        }


def _readable(checkpoint: Checkpoint, tokenizer: str) -> list[Sequences]:
    """qrank's queries, without those in scripts that the tokenizer does not know."""
    works = [
        encode_pairs([(query, text) for text in texts], tokenizer, checkpoint.family)
        for query, texts in ranking_data().queries
    ]
    unknown = checkpoint.tokenizer.unk_token_id
    return [w for w in works if np.mean(np.concatenate(w.ids) == unknown) < 0.2]


def _cut(work: Sequences, length: int) -> Sequences:
    """Pairs without the tokens of the document that exceed a length; the last token stays."""

    def cut(row: Any) -> Any:
        return row if len(row) <= length else np.append(row[: length - 1], row[-1:])

    segments = None if work.segments is None else [cut(row) for row in work.segments]
    return Sequences([cut(row) for row in work.ids], segments)


def _ndcg(qrels: Any, run: Any, logits: dict[str, Logits]) -> Any:
    orders = {
        query: [list(found)[i] for i in np.argsort(-logits[query], kind="stable")]
        for query, found in run.items()
    }
    return measure(qrels, orders, [MAIN])[MAIN]


@torch.inference_mode()
def _scored(model: Any, works: Sequence[Sequences]) -> list[Logits]:
    """Logits of each work; pairs of similar length share a batch."""
    found = []
    for work in works:
        order = np.argsort(work.lengths, kind="stable")
        logits = np.empty(len(work), np.float32)
        for begin in range(0, len(order), _BATCH):
            places = order[begin : begin + _BATCH]
            inputs = {name: torch.tensor(x) for name, x in padded(work.take(places)).items()}
            del inputs["last"]
            logits[places] = model(**inputs).logits[:, 0].float().numpy()
        found.append(logits)
    return found


@contextmanager
def _rounding(model: Any, point: str, tried: Sequences) -> Iterator[Any]:
    """A model whose matrices, except the head's, are rounded; see `POINTS`."""
    kind, bits = point.split()
    levels = 2 ** (int(bits) - 1) - 1
    head = {id(module) for module in model.classifier.modules()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in head
    ]
    with torch.no_grad():
        for layer in layers:
            weight = layer.weight
            size = weight.abs()
            largest = size.max() if kind == "tensor" else size.amax(1, keepdim=True)
            step = largest.clamp_min(1e-12) / (127 if kind == "activations" else levels)
            weight.copy_((weight / step).round() * step)
    if kind == "activations":
        _round_inputs(model, layers, tried, levels)
    yield model


def _round_inputs(model: Any, layers: Sequence[Any], tried: Sequences, levels: int) -> None:
    largest: dict[int, float] = {}

    def watch(layer: Any, inputs: Any) -> None:
        largest[id(layer)] = max(largest.get(id(layer), 0.0), float(inputs[0].abs().max()))

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    _scored(model, [tried])
    for hook in hooks:
        hook.remove()

    def rounded(layer: Any, inputs: Any) -> Any:
        step = largest[id(layer)] / levels
        return ((inputs[0] / step).round().clamp(-levels - 1, levels) * step, *inputs[1:])

    for layer in layers:
        layer.register_forward_pre_hook(rounded)


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss against what each of the three figures lacks of 1, with half of its 95 % interval."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"

    figure = Figure(figsize=(10, 4), layout="constrained")
    grey = "#808080"
    rows = [row for row in rows if row.get("nDCG@10 lost") is not None]
    for place, name in enumerate(("tau", "top 10", "nDCG")):
        axes = figure.add_subplot(1, 3, place + 1)
        for kind, color in (("rounded", "#7a7a7a"), ("variant", "#d97706")):
            chosen = [row for row in rows if row["kind"] == kind]
            axes.errorbar(
                [1 - row[name] for row in chosen],
                [row["nDCG@10 lost"] for row in chosen],
                yerr=[row.get("±") or 0.0 for row in chosen],
                fmt="o",
                color=color,
                elinewidth=0.5,
                label={"rounded": "weights rounded", "variant": "variants"}[kind],
            )
            for row in chosen:
                axes.annotate(
                    row["what"],
                    (1 - row[name], row["nDCG@10 lost"]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=color,
                )
        axes.axhline(0, color=grey, linewidth=0.6)
        axes.set_xscale("log")
        what = {"tau": "Kendall's tau", "top 10": "shared top 10", "nDCG": "nDCG"}[name]
        axes.set_xlabel(f"1 - {what}")
        axes.tick_params(colors=grey, which="both")
        axes.xaxis.label.set_color(grey)
        axes.yaxis.label.set_color(grey)
        for side in axes.spines.values():
            side.set_color(grey)
        if place == 0:
            axes.set_ylabel("nDCG@10 lost")
            axes.legend(frameon=False, labelcolor=grey, fontsize=8)
    figure.savefig(path, transparent=True)


if __name__ == "__main__":
    main()
