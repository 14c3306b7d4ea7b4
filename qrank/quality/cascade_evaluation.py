"""Evaluate cascades of two rerankers, composed of the scores of both, and fit their early exit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.cascade import stage_of
from qrank.errors import InputError
from qrank.quality.bm25 import Run
from qrank.quality.collection import Collection
from qrank.quality.metrics import MAIN, Difference, measure
from qrank.quality.score_cache import Setting, score
from qrank.reranker import Reranker
from qrank.scoring import early_exit
from qrank.scoring.early_exit import EarlyExit, Query
from qrank.system.extras import need
from qrank.system.steps import Progress, no_progress

KEEPS = (10, 20, 50)
"""Documents that the large model rescores, unless asked."""

TIMED = 5
"""Queries whose candidates both models are timed on."""

ERRORS = (0.02, 0.05, 0.1, 0.2)
"""Errors whose early exit is reported."""

Order = list[str]


@dataclass(frozen=True)
class Row:
    """The first stage, a model alone, or a cascade.

    Attributes:
        name: of the model, or `keep 20`.
        keep: documents that the large model scores; None: no cascade.
        measures: means over queries.
        difference: nDCG@10 minus the large model's; None for the large model itself.
        milliseconds: mean time per query; None for the first stage, which is not timed.
    """

    name: str
    keep: int | None
    measures: dict[str, float]
    difference: Difference | None
    milliseconds: float | None


@dataclass(frozen=True)
class Exit:
    """What an early exit does on queries that it was not fitted on.

    Attributes:
        error: the stated error.
        rescored: mean number of documents that the large model scores of a query.
        agreement: share of queries whose top k is that of full rescoring; None, like `rescored`,
            if the error takes more queries than there were.
    """

    error: float
    rescored: float | None
    agreement: float | None


@dataclass(frozen=True)
class CascadeEvaluation:
    """Result of `evaluate_cascade`.

    Attributes:
        models: names of the small and the large model; `small` and `large` if they are the same.
        targets: what was scored and timed.
        data: the collection's name.
        queries: number of queries.
        depth: largest number of candidates of a query.
        pair_ms: milliseconds a pair of each model, measured on TIMED queries.
        rows: the first stage, the models alone, the cascades.
        top_k: number of documents that the early exit settles.
        keep: documents that it was fitted on: the largest number.
        fit: queries that it was fitted on; 0: there were too few to fit.
        held_out: queries that `exits` are of.
        exits: by error.
        file: where it is stored; None: it was not fitted.
    """

    models: list[str]
    targets: list[str]
    data: str
    queries: int
    depth: int
    pair_ms: list[float]
    rows: list[Row]
    top_k: int
    keep: int
    fit: int
    held_out: int
    exits: list[Exit]
    file: str | None


def evaluate_cascade(
    models: Sequence[str | Path | Bundle],
    collection: Collection,
    candidates: Run,
    settings: Sequence[Setting],
    *,
    first: str = "first stage",
    backends: Sequence[str | None] = (None, None),
    keeps: Sequence[int] = KEEPS,
    top_k: int = 10,
    progress: Progress = no_progress,
) -> CascadeEvaluation:
    """Score all candidates with both models, and compose the cascades' orders and times.

    An order is exactly that of `Cascade`. A time is the sum of the pairs' times: both models are
    timed on all candidates of a few queries, in turns.

    Args:
        models: the small and the large one.
        collection: texts and judgements.
        candidates: candidates of the queries to evaluate, in the first stage's order.
        settings: how each model is opened.
        first: name of the first stage.
        backends: of each model; None: as `Reranker` chooses.
        keeps: how many documents the large model scores, in each cascade.
        top_k: number of documents that the early exit settles.
        progress: called after each query of each target.

    Raises:
        InputError: no query has a candidate.
        TargetError: a model cannot run here.
    """
    if not any(candidates.values()):
        raise InputError(f"no candidate for any of the {len(candidates)} queries")
    for package in ("ir_measures", "scipy.stats"):
        need(package)  # before hours of scoring, not after
    with ExitStack() as stack:
        rerankers = [
            stack.enter_context(setting.open(model, backend))
            for setting, model, backend in zip(settings, models, backends, strict=True)
        ]
        settings = [_for(*each) for each in zip(rerankers, settings, strict=True)]
        seconds = _timed(rerankers, settings, collection, candidates)
        scored = [
            score(
                each,
                own,
                collection,
                candidates,
                custom=":" in (backend or ""),
                progress=progress,
            ).logits
            for each, own, backend in zip(rerankers, settings, backends, strict=True)
        ]
        stages = [stage_of(each) for each in rerankers]
        targets = [each.target.name for each in rerankers]
    names = [each.model for each in stages]
    if names[0] == names[1]:
        names = ["small", "large"]
    small, large = scored
    deepest = max(map(len, candidates.values()))
    places: dict[str, tuple[int | None, dict[str, Order], float | None]] = {
        first: (None, {query: list(found) for query, found in candidates.items()}, None)
    }
    both = ((names[0], small, seconds[0]), (names[1], large, seconds[1]))
    count = float(np.mean([len(found) for found in candidates.values()]))
    for name, logits, each in both:
        order = {query: _named(found, _order(logits[query])) for query, found in candidates.items()}
        places[name] = (None, order, 1000 * each * count)
    for keep in sorted(set(keeps)):
        order = {
            query: _named(found, cascaded(small[query], large[query], keep))
            for query, found in candidates.items()
        }
        kept = float(np.mean([min(keep, len(found)) for found in candidates.values()]))
        ms = 1000 * (seconds[0] * count + seconds[1] * kept)
        places[f"keep {keep}"] = (keep, order, ms)
    values = {name: measure(collection.qrels, order) for name, (_, order, _) in places.items()}
    best = values[names[1]][MAIN]
    rows = [
        Row(
            name=name,
            keep=keep,
            measures={key: float(each.mean()) for key, each in values[name].items()},
            difference=None if name == names[1] else Difference.of(values[name][MAIN], best),
            milliseconds=ms,
        )
        for name, (keep, _, ms) in places.items()
    ]
    keep = min(max(keeps), deepest)
    exit, exits, counts = _exits(small, large, keep, top_k)
    return CascadeEvaluation(
        models=names,
        targets=targets,
        data=collection.name,
        queries=len(candidates),
        depth=deepest,
        pair_ms=[1000 * each for each in seconds],
        rows=rows,
        top_k=top_k,
        keep=keep,
        fit=counts[0],
        held_out=counts[1],
        exits=exits,
        file=None if exit is None else str(early_exit.save(stages, exit)),
    )


def cascaded(small: Logits, large: Logits, keep: int) -> list[int]:
    """The order of a cascade's documents, from both models' logits of all of them."""
    before = _order(small)
    kept = before[:keep]
    return [kept[place] for place in _order(large[kept])] + before[keep:]


def _order(logits: Logits) -> list[int]:
    """The best first; ties keep their order, as in `Reranker.rank`."""
    order: list[int] = np.argsort(-logits, kind="stable").tolist()
    return order


def _named(documents: Mapping[str, float], order: Sequence[int]) -> Order:
    names = list(documents)
    return [names[place] for place in order]


def _for(reranker: Reranker, setting: Setting) -> Setting:
    """The setting of one model: an instruction is for those that take one, as in `Cascade`."""
    takes_it = reranker.engine.manifest.family.takes_instruction
    return setting if takes_it else replace(setting, instruction=None)


def _timed(
    rerankers: Sequence[Reranker],
    settings: Sequence[Setting],
    collection: Collection,
    candidates: Run,
) -> list[float]:
    """Seconds a pair of each model."""
    chosen = [query for query, found in candidates.items() if found][:TIMED]
    took, pairs = [0.0] * len(rerankers), 0
    for number, query in enumerate([chosen[0], *chosen]):
        texts = [collection.documents[name] for name in candidates[query]]
        if number == 0:  # warms up
            texts = texts[:8]
        for place, (each, own) in enumerate(zip(rerankers, settings, strict=True)):
            begun = time.perf_counter()
            each.rank(
                collection.queries[query],
                texts,
                instruction=own.instruction,
                long_documents=own.long_documents,
            )
            took[place] += (time.perf_counter() - begun) * (number > 0)
        pairs += len(texts) * (number > 0)
    return [seconds / pairs for seconds in took]


def _exits(
    small: Mapping[str, Logits], large: Mapping[str, Logits], keep: int, top_k: int
) -> tuple[EarlyExit | None, list[Exit], tuple[int, int]]:
    """Fit an early exit on half of the queries, and measure it on the other half.

    Of the half that it is fitted on, a quarter gives the slope, and the others the margins.

    Returns:
        The early exit, what it does, and the numbers of queries of the two halves; None and zeros
        if there are too few queries.
    """
    found: list[Query] = []
    for query in large:
        if len(kept := _order(small[query])[:keep]):
            found.append((small[query][kept], large[query][kept]))
    order = np.random.default_rng(0).permutation(len(found))
    shuffled = [found[i] for i in order]
    half = len(shuffled) // 2
    line, fit, held_out = shuffled[: half // 4], shuffled[half // 4 : half], shuffled[half:]
    if not line:
        return None, [], (0, 0)
    exit = EarlyExit.fit(line, fit, top_k)
    exits = []
    for error in ERRORS:
        margin = exit.margin(error)
        if margin == np.inf:
            exits.append(Exit(error, None, None))
            continue
        counts = [exit.rescored(before, after, margin) for before, after in held_out]
        right = [
            _order(after[:count])[:top_k] == _order(after)[:top_k]
            for (_, after), count in zip(held_out, counts, strict=True)
        ]
        exits.append(Exit(error, float(np.mean(counts)), float(np.mean(right))))
    return exit, exits, (half, len(held_out))
