"""Evaluate every variant of a bundle on a test collection, and its loss against fp32."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qrank.bundle.manifest import Manifest
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.errors import InputError, MissingExtraError, TargetError
from qrank.quality.bm25 import Run
from qrank.quality.collection import Collection
from qrank.quality.metrics import MAIN, Difference, Order, kendall, measure, overlap
from qrank.quality.score_cache import Scored, Setting, score
from qrank.select.losses import Loss, remember
from qrank.select.obtain import Wanted, obtain
from qrank.select.targets import Target, named
from qrank.system.extras import need
from qrank.system.steps import Progress, no_progress

WITHIN = 50
"""Top documents of the first stage that the reranked top 10 should come from."""

AGREEMENT = 0.6
"""If a smaller share of the reranked top 10 comes from them, the first stage and the reranker seem
made for different tasks."""

ORIGINAL = "torch-fp32"
"""Backend that runs a checkpoint as the reference."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Row:
    """One run: of the first stage, the reference checkpoint or a variant.

    Attributes:
        name: for example `onnx-int8`.
        measures: means over queries.
        difference: nDCG@10 minus the reference's; None for the reference itself.
        kendall: tau-b of logits against the reference's, mean over queries; None for the
            reference itself, and if no query has two candidates.
        overlap: share of the top 10 that is in the reference's top 10 too, mean over queries;
            None for the reference itself.
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
    """Result of `evaluate`.

    Attributes:
        model: the bundle's name.
        data: the collection's name.
        queries: number of queries.
        depth: largest number of candidates of a query.
        recall: share of relevant documents that are among the candidates: reranking does not
            change it.
        reference: name of the row that the others are compared with.
        why: why that row is the reference.
        agreement: share of the reference's top 10 in the first stage's top 50; None if no query
            has more candidates than these.
        rows: the first stage, the checkpoint if one was given, then variants.
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
    model: str | Path | Bundle,
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

    The reference is the checkpoint given; else the bundle's fp32 variant; else the variant closest
    to the original on the probes. nDCG@10 losses against fp32 are stored by `qrank.select.losses`.

    Args:
        model: a bundle.
        collection: texts and judgements.
        candidates: candidates of the queries to evaluate, in the first stage's order.
        setting: how targets are opened.
        first: name of the first stage.
        backends: see `qrank.select.targets.named`. Empty: all variants, except those that cannot
            run here.
        reference: a checkpoint, which torch runs in fp32. None: see above.
        family: card that reads the checkpoint.
        progress: called after each query of each target.

    Raises:
        InputError: there are no queries, or no query has a candidate.
        TargetError: a variant that was named cannot run here, or no variant can.
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
    bundle = obtain(model, Wanted(backends, setting.device))
    manifest = bundle.manifest
    selectors = _selectors(manifest, backends)
    exact = [v.name for v in manifest.variants.values() if v.precision == "fp32"]
    scored: dict[str, Scored] = {}
    failed: dict[str, str] = {}
    same = True
    if reference is not None:
        # `device` and `compute_dtype` are meant for the variants' backends.
        plain = replace(setting, device=None, compute_dtype=None)
        with plain.open(reference, ORIGINAL, family) as reranker:
            same = reranker.engine.manifest.source.fingerprint == manifest.source.fingerprint
            if not same:
                log.warning("%s is not what %s was converted from", reference, manifest.name)
            scored[ORIGINAL] = score(reranker, plain, collection, candidates, progress=progress)
    # The bundle's own reference is scored even if it is not named.
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
    """A `backend` argument for each variant that `backends` select; a user's own stay as given."""
    names: list[str] = []
    for backend in backends:
        if ":" in backend:
            names.append(backend)
        else:
            runs = named(manifest, backend)
            names += [Target(variant, "", runner).key.selector for variant, runner in runs]
    return names or list(manifest.variants)


def _reference(manifest: Manifest, names: Sequence[str]) -> tuple[str, str]:
    """Name of the reference row, and why it was chosen."""
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
    """Each query's documents, best first; ties keep their order, as in `Reranker.rank`."""
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
