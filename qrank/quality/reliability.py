"""Fit a calibration on labelled pairs, and measure its reliability on held-out ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.errors import InputError
from qrank.quality.bm25 import Run
from qrank.quality.collection import Collection
from qrank.quality.score_cache import Setting, score
from qrank.scoring.activation import Scores, activate
from qrank.scoring.calibration import METHODS, Labels, check_folder, save
from qrank.system.steps import Progress, no_progress

log = logging.getLogger("qrank")

BINS = 10
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Part:
    """Counts of a part of the queries, of their pairs, and of the relevant pairs."""

    queries: int
    pairs: int
    relevant: int


@dataclass(frozen=True)
class Reliability:
    """How far scores are from probabilities; 0 is best.

    Attributes:
        brier: mean squared difference to the label.
        error: expected calibration error: see `expected_calibration_error`.
    """

    brier: float
    error: float

    @classmethod
    def of(cls, scores: Scores, labels: Labels) -> Reliability:
        """Compute both from scores (0 to 1) and their labels, both of shape [n]."""
        return cls(
            float(np.mean((scores - labels) ** 2)), expected_calibration_error(scores, labels)
        )


@dataclass(frozen=True)
class Threshold:
    """Effect of keeping only pairs with at least a given score.

    Attributes:
        score: the lowest score that is kept.
        kept: number of pairs kept.
        precision: share of the kept pairs that are relevant; None if no pair is kept.
        recall: share of the relevant pairs that are kept.
    """

    score: float
    kept: int
    precision: float | None
    recall: float


@dataclass(frozen=True)
class Report:
    """Result of `calibrate`; all figures but `fit` are for the held-out pairs.

    Attributes:
        model: the bundle's name.
        target: the calibrated target, for example `onnx-int8@cpu`.
        data: the collection's name.
        method: `platt` or `isotonic`.
        fit: pairs that the calibration was fitted on.
        held_out: pairs of other queries.
        before: reliability of the sigmoids of logits / temperature: the model's own scores, unless
            those are not probabilities.
        after: reliability of the calibrated scores.
        thresholds: by calibrated score.
        file: path of the stored calibration.
    """

    model: str
    target: str
    data: str
    method: str
    fit: Part
    held_out: Part
    before: Reliability
    after: Reliability
    thresholds: list[Threshold]
    file: str


def calibrate(
    model: str | Path | Bundle,
    collection: Collection,
    candidates: Run,
    setting: Setting,
    *,
    backend: str | None = None,
    method: str = "platt",
    relevant: int = 1,
    progress: Progress = no_progress,
) -> Report:
    """Fit a calibration on half of the queries, store it, and report on the other half.

    Args:
        model: a bundle, or with backend `torch` a checkpoint.
        collection: texts and judgements.
        candidates: the pairs, by query; pairs without a judgement count as not relevant.
        setting: how the target is opened.
        backend: a format or variant. None: as `Reranker` chooses.
        method: one of `qrank.scoring.calibration.METHODS`.
        relevant: the lowest judgement that counts as relevant.
        progress: called after each query.

    Raises:
        InputError: there are too few pairs, all pairs have the same label, or labels and logits
            disagree; or the backend is a user's own, which has no variant in a bundle.
    """
    if backend is not None and ":" in backend:
        raise InputError(f"a calibration belongs to a variant of a bundle, not to {backend}")
    queries = [query for query, found in candidates.items() if found]
    if len(queries) < 2:
        raise InputError(
            f"{len(queries)} of {len(candidates)} queries have candidates; 2 or more are needed"
        )
    if len(queries) < len(candidates):
        log.warning(
            "%d of %d queries have no candidate and are left out",
            len(candidates) - len(queries),
            len(candidates),
        )
    check_folder()
    with setting.open(model, backend) as reranker:
        scored = score(reranker, setting, collection, candidates, progress=progress)
        manifest, target = reranker.engine.manifest, reranker.target
    # Split by query: pairs of the same query are too alike to test on.
    order = np.random.default_rng(0).permutation(len(queries))
    half = len(queries) // 2
    parts = [sorted(order[:half]), sorted(order[half:])]

    def pairs(chosen: Sequence[int]) -> tuple[Logits, Labels, Part]:
        names = [queries[i] for i in chosen]
        labels = np.array(
            [
                collection.qrels[query].get(document, 0) >= relevant
                for query in names
                for document in candidates[query]
            ]
        )
        logits = np.concatenate([scored.logits[query] for query in names])
        return logits, labels, Part(len(names), len(labels), int(labels.sum()))

    logits, labels, fit = pairs(parts[0])
    calibration = METHODS[method].fit(logits, labels)
    logits, labels, held_out = pairs(parts[1])
    if not held_out.relevant:
        raise InputError(
            f"none of the {held_out.pairs} held-out pairs is relevant; give more queries"
        )
    family = manifest.family
    before = activate(logits, "sigmoid", family.temperature)
    after = calibration.apply(logits)
    return Report(
        model=manifest.name,
        target=target.name,
        data=collection.name,
        method=method,
        fit=fit,
        held_out=held_out,
        before=Reliability.of(before, labels),
        after=Reliability.of(after, labels),
        thresholds=[_threshold(after, labels, least) for least in THRESHOLDS],
        file=str(save(manifest, target.variant, calibration)),
    )


def expected_calibration_error(scores: Scores, labels: Labels) -> float:
    """Mean gap between a bin's mean score and its share of relevant pairs, weighted by pairs.

    Ten bins of equal width from 0 to 1, as in C. Guo et al., "On calibration of modern neural
    networks", ICML 2017.

    Args:
        scores: from 0 to 1, shape [n].
        labels: their labels, shape [n].
    """
    places = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(places, scores - labels, BINS)
    return float(np.abs(gaps).sum() / len(scores))


def _threshold(scores: Scores, labels: Labels, least: float) -> Threshold:
    kept = scores >= least
    count, right = int(kept.sum()), int((kept & labels).sum())
    return Threshold(least, count, right / count if count else None, right / int(labels.sum()))
