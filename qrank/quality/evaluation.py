"""Every variant of a bundle over a test collection: what it ranks, and what it lost to fp32."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qrank.bundle.locate import locate
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Logits
from qrank.errors import InputError, MissingExtraError, TargetError
from qrank.quality.collection import Collection, Run
from qrank.quality.metrics import MAIN, Difference, Order, kendall, measure, overlap
from qrank.quality.score_cache import Progress, Scored, Setting, no_progress, score
from qrank.select.losses import Loss, remember
from qrank.select.targets import Target, named
from qrank.system.extras import need

WITHIN = 50
"""Documents of the first stage that the reranked top 10 should come from."""

AGREEMENT = 0.6
"""The share of them below which the first stage and the reranker seem made for different work."""

ORIGINAL = "torch-fp32"
"""What a checkpoint that is the reference runs as."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Row:
    """One run: the first stage's, or a variant's.

    Attributes:
        name: `onnx-int8`.
        measures: means over queries.
        difference: of nDCG@10, to the reference's; None for the reference itself.
        kendall: tau-b of logits against the reference's, mean over queries.
        overlap: share of the top 10 that is the reference's too, mean over queries.
        before: queries that were scored by an earlier evaluation.
    """

    name: str
    measures: dict[str, float]
    difference: Difference | None
    kendall: float | None
    overlap: float | None
    before: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        model: the bundle's name.
        data: the collection's name.
        queries: how many.
        depth: most candidates of a query.
        recall: share of relevant documents among the candidates: no order changes it.
        reference: which row the others are compared with.
        why: it is the one.
        agreement: share of its top 10 in the first stage's top 50; None where no query has more
            candidates than these.
        rows: the first stage, then variants.
        failed: variants that could not run -> the reason.
    """

    model: str
    data: str
    queries: int
    depth: int
    recall: float
    reference: str
    why: str
    agreement: float | None
    rows: list[Row]
    failed: dict[str, str]


def evaluate(
    model: str | Path,
    collection: Collection,
    candidates: Run,
    setting: Setting,
    *,
    first: str = "first stage",
    backends: Sequence[str] = (),
    reference: str | None = None,
    family: str | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Rerank every query's candidates with every variant of a bundle and compare.

    The reference is the checkpoint named, or the bundle's fp32 variant, or the variant closest to
    the original on the probes. nDCG@10 lost to fp32 is kept for `qrank.select.losses`.

    Args:
        model: a bundle.
        collection: texts and judgements.
        candidates: of the queries to evaluate, in the first stage's order.
        setting: how targets are opened.
        first: what the first stage is called.
        backends: see `qrank.select.targets.named`. Empty: all variants, of which those that cannot
            run here are left out.
        reference: the checkpoint, which torch runs in fp32.
        family: card that reads it.
        progress: called after each query of each target.

    Raises:
        InputError: there are no queries, or none has a candidate.
        TargetError: a variant that was named, or every one, cannot run here.
    """
    if not candidates:
        raise InputError("there is no query to evaluate")
    empty = sum(not found for found in candidates.values())
    if empty == len(candidates):
        raise InputError(
            f"no candidate for any of the {empty} queries: {first} finds nothing to rerank; give "
            "a first stage that does (--run)"
        )
    if empty:
        log.warning(
            "%s finds no candidate for %d of %d queries; they count as 0 in every row",
            first,
            empty,
            len(candidates),
        )
    for package in ("ir_measures", "scipy.stats"):
        need(package)  # before hours of scoring, not after
    bundle = locate(model)
    manifest = bundle.manifest
    selectors = _selectors(manifest, backends)
    exact = [v.name for v in manifest.variants.values() if v.precision == "fp32"]
    scored: dict[str, Scored] = {}
    failed: dict[str, str] = {}
    same = True
    if reference is not None:
        # Devices and arithmetic are those of the variants' backends.
        plain = replace(setting, device=None, compute_dtype=None)
        with plain.open(reference, ORIGINAL, family) as reranker:
            same = reranker.engine.manifest.source.fingerprint == manifest.source.fingerprint
            if not same:
                log.warning("%s is not what %s was converted from", reference, manifest.name)
            scored[ORIGINAL] = score(reranker, plain, collection, candidates, progress=progress)
    # The bundle's own reference is scored whether it is named or not.
    for name in dict.fromkeys([*(exact if reference is None else ()), *selectors]):
        try:
            with setting.open(bundle, name) as reranker:
                scored[name] = score(
                    reranker,
                    setting,
                    collection,
                    candidates,
                    custom=":" in name,
                    progress=progress,
                )
        except (MissingExtraError, TargetError) as error:
            if backends and name in selectors:
                raise
            failed[name] = str(error)
    if not scored.keys() - {ORIGINAL}:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise TargetError(f"no variant of {manifest.name} can run here:{reasons}")
    best, why = _reference(manifest, list(scored))
    orders = {name: _orders(candidates, found.logits) for name, found in scored.items()}
    rows = _rows(collection, candidates, first, scored, orders, best)
    if same and best in (ORIGINAL, *exact):
        remember(manifest, _losses(manifest, rows, len(candidates), collection.name))
    depth = max(map(len, candidates.values()))
    as_found = {query: list(found) for query, found in candidates.items()}
    recall = measure(collection.qrels, as_found, [f"R@{max(depth, 1)}"])
    return Evaluation(
        model=manifest.name,
        data=collection.name,
        queries=len(candidates),
        depth=depth,
        recall=float(next(iter(recall.values())).mean()),
        reference=best,
        why=why,
        agreement=overlap(orders[best], as_found, within=WITHIN) if depth > WITHIN else None,
        rows=rows,
        failed=failed,
    )


def _selectors(manifest: Manifest, backends: Sequence[str]) -> list[str]:
    """What names each variant that backends stand for, and a user's own backends."""
    names: list[str] = []
    for backend in backends:
        if ":" in backend:
            names.append(backend)
        else:
            runs = named(manifest, backend)
            names += [Target(variant, "", runner).key.selector for variant, runner in runs]
    return names or list(manifest.variants)


def _reference(manifest: Manifest, names: Sequence[str]) -> tuple[str, str]:
    """What the others are compared with, and why."""
    if ORIGINAL in names:
        return ORIGINAL, "the checkpoint itself"
    variants = [manifest.variants[name] for name in names if name in manifest.variants]
    for variant in variants:
        if variant.precision == "fp32":
            return variant.name, "the bundle's fp32 variant"
    if not variants:
        return names[0], "the first named"
    closest = min(variants, key=lambda v: v.fidelity.max_abs)
    return closest.name, "no fp32 at hand: the closest to it on the bundle's probes"


def _orders(candidates: Run, logits: Mapping[str, Logits]) -> dict[str, list[str]]:
    """Each query's documents, best first; equal ones keep their order, as in `Reranker.rank`."""
    orders = {}
    for query, found in candidates.items():
        names = list(found)
        orders[query] = [names[i] for i in np.argsort(-logits[query], kind="stable")]
    return orders


def _rows(
    collection: Collection,
    candidates: Run,
    first: str,
    scored: Mapping[str, Scored],
    orders: Mapping[str, Order],
    best: str,
) -> list[Row]:
    found = {query: np.array(list(c.values()), np.float32) for query, c in candidates.items()}
    logits = {first: found, **{name: item.logits for name, item in scored.items()}}
    orders = {first: _orders(candidates, found), **orders}
    values = {name: measure(collection.qrels, order) for name, order in orders.items()}
    rows = []
    for name in orders:
        reference = name == best
        rows.append(
            Row(
                name=name,
                measures={key: float(each.mean()) for key, each in values[name].items()},
                difference=None
                if reference
                else Difference.of(values[name][MAIN], values[best][MAIN]),
                kendall=None if reference else kendall(logits[name], logits[best]),
                overlap=None if reference else overlap(orders[name], orders[best]),
                before=scored[name].before if name in scored else 0,
            )
        )
    return rows


def _losses(manifest: Manifest, rows: Sequence[Row], queries: int, data: str) -> dict[str, Loss]:
    losses = {}
    for row in rows:
        if row.name in manifest.variants and queries > 1:
            gain = row.difference or Difference(0.0, 0.0, None)
            losses[row.name] = Loss(0.0 - gain.mean, gain.margin or 0.0, queries, data)
    return losses
