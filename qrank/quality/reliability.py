"""Fit a calibration on labelled pairs, and see on held-out ones how far it can be relied on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.bundle.sequences import Logits
from qrank.errors import InputError
from qrank.quality.collection import Collection, Run
from qrank.quality.score_cache import Progress, Setting, no_progress, score
from qrank.scoring.activation import Scores, activate
from qrank.scoring.calibration import METHODS, Labels, check_folder, save

log = logging.getLogger("qrank")

BINS = 10
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Part:
    """Pairs of some of the queries, and how many of them are relevant."""

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
        """Of scores from 0 to 1 and their labels, both of shape [n]."""
        return cls(
            float(np.mean((scores - labels) ** 2)), expected_calibration_error(scores, labels)
        )


@dataclass(frozen=True)
class Threshold:
    """What keeping pairs of a score or more would do.

    Attributes:
        score: the least that is kept.
        kept: pairs.
        precision: share of those that are relevant; None of no pairs.
        recall: share of the relevant pairs that are kept.
    """

    score: float
    kept: int
    precision: float | None
    recall: float


@dataclass(frozen=True)
class Report:
    """What `calibrate` found; everything but `fit` is of the held-out pairs.

    Attributes:
        model: the bundle's name.
        target: what was calibrated: `onnx-int8@cpu`.
        data: the collection's name.
        method: `platt` or `isotonic`.
        fit: pairs it was fitted on.
        held_out: pairs of other queries.
        before: of the model's own scores; of logits' sigmoids where these are no probabilities.
        after: of the calibrated ones.
        thresholds: by calibrated score.
        file: where the calibration is kept.
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
    model: str | Path,
    collection: Collection,
    candidates: Run,
    setting: Setting,
    *,
    backend: str | None = None,
    method: str = "platt",
    relevant: int = 1,
    progress: Progress = no_progress,
) -> Report:
    """Fit a calibration on half of the queries, keep it, and report on the other half.

    Args:
        model: a bundle, or with backend `torch` a checkpoint.
        collection: texts and judgements.
        candidates: the pairs, by query; one without a judgement counts as not relevant.
        setting: how the target is opened.
        backend: a format or variant. None: as `Reranker` chooses.
        method: of `qrank.scoring.calibration.METHODS`.
        relevant: the least judgement that counts as relevant.
        progress: called after each query.

    Raises:
        InputError: there are too few pairs, or of one kind only, or labels and logits disagree;
            or the backend is a user's own, which no bundle names.
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
    # By query: pairs of one are too alike to tell how the next will fare.
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
    """Mean difference of a bin's mean score and its share of relevant pairs, weighted by pairs.

    Ten bins of equal width from 0 to 1, as in C. Guo et al., "On calibration of modern neural
    networks", ICML 2017.

    Args:
        scores: from 0 to 1, shape [n].
        labels: alongside.
    """
    places = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(places, scores - labels, BINS)
    return float(np.abs(gaps).sum() / len(scores))


def _threshold(scores: Scores, labels: Labels, least: float) -> Threshold:
    kept = scores >= least
    count, right = int(kept.sum()), int((kept & labels).sum())
    return Threshold(least, count, right / count if count else None, right / int(labels.sum()))
