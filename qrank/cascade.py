"""A chain of rerankers: a small one scores all documents, larger ones rescore the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.errors import InputError
from qrank.reranker import Reranker
from qrank.scoring import arguments, early_exit
from qrank.scoring.asked import Asked
from qrank.scoring.deadline import LatencyEstimate
from qrank.scoring.inputs import LongDocuments, ModelInput
from qrank.scoring.ranker import Ranker
from qrank.scoring.ranking import Ranking, Rankings, ScoredPairs

KEEP = 20
"""Documents that the last reranker scores, unless asked."""


class Cascade(Ranker):
    """Ranks with several rerankers, each of which scores the best documents of the one before.

    Thread-safe, like its rerankers. Pickling or copying opens the models again, as for `Reranker`.
    """

    def __init__(
        self,
        rerankers: Iterable[Reranker | Bundle | str | Path],
        keep: int | Sequence[int] = KEEP,
        *,
        error: float | None = None,
    ) -> None:
        """Open the models that are not open.

        Args:
            rerankers: two or more, the fastest first. A model's name is opened as `Reranker(name)`;
                for other options, give a `Reranker`.
            keep: how many documents the second one scores, the best of the first; with more than
                two rerankers, a number for each but the first, none above the one before.
            error: stop rescoring when the best documents are settled: for this share of queries,
                more than 0 and below 1, they may differ from those of full rescoring. It takes what
                `qrank eval SMALL LARGE` fitted for these two variants, and a `top_k` that it was
                fitted for. None: score all that are kept.

        Raises:
            InputError: an argument is invalid; or `error` is given, and nothing was fitted, or on
                too few queries.
            QrankError: a model cannot be opened; see `Reranker`.
        """
        if isinstance(rerankers, str | Path | Bundle | Reranker):
            rerankers = [rerankers]
        models = list(rerankers)
        if len(models) < 2:
            raise arguments.wrong("rerankers", models, "two or more, the fastest first")
        self.keep = _counts(keep, len(models) - 1)
        share = "a share of queries, more than 0 and below 1"
        error = arguments.number("error", error, share, lambda x: 0 < x < 1)
        if error is not None and len(models) > 2:
            raise InputError(f"error goes with two rerankers, not with {len(models)}")
        self.rerankers = tuple(m if isinstance(m, Reranker) else Reranker(m) for m in models)
        self._arguments: dict[str, Any] = {
            "rerankers": self.rerankers,
            "keep": self.keep,
            "error": error,
        }
        self._exit: early_exit.EarlyExit | None = None
        self._margin = math.inf
        if error is not None:
            self._exit, self._margin = self._fitted(error)
        # In documents instead of tokens: a stage is planned before its documents are encoded.
        self._costs = [LatencyEstimate() for _ in self.rerankers]

    def _fitted(self, error: float) -> tuple[early_exit.EarlyExit, float]:
        """The early exit of these rerankers, and its margin for an error."""
        found = early_exit.load([stage_of(each) for each in self.rerankers])
        if found.keep < self.keep[-1]:
            raise InputError(
                f"the early exit was fitted on the best {found.keep} documents, and keep is "
                f"{self.keep[-1]}; fit another: qrank eval SMALL LARGE --keep {self.keep[-1]}"
            )
        margin = found.margin(error)
        if margin == math.inf:
            least = math.ceil(1000 / (found.queries + 1)) / 1000
            raise InputError(
                f"error is {error:g}, which {found.queries} queries cannot tell: give {least:g} or "
                "more, or fit on more queries"
            )
        return found, margin

    def rank(
        self,
        query: str,
        documents: Iterable[str | Mapping[str, Any]],
        *,
        text_key: str = "text",
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Rankings:
        """Order documents by relevance: those of the last reranker first, each stage by its scores.

        A result's `stage` tells which reranker its score and logit are of. Documents that were not
        kept follow in the order of the stage before, and unscored ones in their own.

        Args:
            query: as the others, see `Reranker.rank`.
            documents: see there.
            text_key: see there.
            top_k: see there.
            instruction: for those models that take one.
            long_documents: see there.
            budget_ms: milliseconds for all stages. A stage leaves the later ones the time they are
                expected to need, but takes up to half of what is left if it needs that. What does
                not fit is left out from the end: documents that the stage before ranks lower. The
                first document is always scored by the first reranker.

        Raises:
            InputError: an argument is invalid, a document has no text or needs more memory than
                there is, or no model takes an instruction.
            TargetError: a backend failed, or returned a logit that is not finite.

        A later stage's error numbers documents by the order of the stage before.
        """
        asked = Asked.of(query, documents, text_key, top_k, instruction, long_documents, budget_ms)
        takes = [each.engine.manifest.family.takes_instruction for each in self.rerankers]
        if asked.instruction is not None and not any(takes):
            raise InputError("no model of this cascade takes an instruction")
        begun = time.perf_counter()
        ranked = [
            Ranking(place, math.nan, math.nan, text, scored=False)
            for place, text in enumerate(asked.texts)
        ]
        counts = [0] * len(self.rerankers)
        kept = len(ranked)
        for stage, takes_it in enumerate(takes):
            if stage:
                kept = min(self.keep[stage - 1], counts[stage - 1])
            own = asked if takes_it else replace(asked, instruction=None)
            left = None
            if asked.seconds is not None:
                left = asked.seconds - (time.perf_counter() - begun)
                if stage and left <= 0:
                    break
            if not kept:
                break
            scored = self._scored(stage, own, ranked[:kept], left)
            counts[stage] = len(scored)
            ranked = _reordered(ranked, scored, stage)
        return Rankings(ranked, counts[0], tuple(counts))[: asked.top_k]

    def close(self) -> None:
        """Free the models; the next use loads them again. See `Reranker.close`."""
        for each in self.rerankers:
            each.close()

    def _scored(
        self, stage: int, asked: Asked, documents: Sequence[Ranking], left: float | None
    ) -> ScoredPairs:
        """Score the first documents: all, or until the time is up or the best are settled.

        Args:
            stage: which reranker.
            asked: how.
            documents: in the order of the stage before, whose logits they have.
            left: seconds for this stage and the later ones; None: no limit.
        """
        engine, count = self.rerankers[stage].engine, len(documents)
        pairs = [(asked.query, each.text) for each in documents]
        exit = self._exit if stage else None
        if exit is not None and (asked.top_k is None or asked.top_k > exit.top_k):
            exit = None
        stops = None if exit is None else exit.stops(count)
        seconds = None if left is None else self._share(stage, count, left)
        how = (stops, asked.instruction, asked.long_documents)
        before = np.array([each.logit for each in documents], np.float32)
        begun = time.perf_counter()
        inputs: list[ModelInput] = []
        logits: list[Logits] = [np.empty(0, np.float32)]
        for some, found in engine.scoring(pairs, *how, seconds=seconds, always=not stage):
            inputs += some
            logits.append(found)
            if exit:
                after = ScoredPairs.of(inputs, np.concatenate(logits), engine.scores).logits
                if len(after) < count and exit.settled(before, after, self._margin):
                    break
        scored = ScoredPairs.of(inputs, np.concatenate(logits), engine.scores)
        if scored:
            took = time.perf_counter() - begun
            self._costs[stage].learn(len(scored), len(scored), took)
        return scored

    def _share(self, stage: int, count: int, left: float) -> float:
        """Seconds for a stage: what the later ones are expected to leave, but at least half."""
        later = 0.0
        for keep, cost in zip(self.keep[stage:], self._costs[stage + 1 :], strict=True):
            if most := min(keep, count):
                expected = cost.expect(most, most)
                later += left if expected is None else expected
        return max(left - later, left / 2)


def stage_of(reranker: Reranker) -> early_exit.Stage:
    """What a reranker runs, as an early exit depends on it."""
    engine, target = reranker.engine, reranker.target
    return early_exit.Stage(
        engine.manifest.name,
        target.key.selector,
        engine.manifest.identity(target.variant),
        engine.max_length,
    )


def _counts(keep: object, stages: int) -> tuple[int, ...]:
    """The argument `keep`: one number for each stage but the first."""
    given = keep if isinstance(keep, list | tuple) else [keep]
    wanted = "a whole number, 0 or more"
    if stages > 1:
        wanted = f"{stages} whole numbers, 0 or more, none above the one before"
    try:
        counts = [arguments.whole("keep", each, 0) for each in given]
    except InputError:
        raise arguments.wrong("keep", keep, wanted) from None
    found = tuple(each for each in counts if each is not None)
    if len(found) != len(given) or len(found) != stages or list(found) != sorted(found)[::-1]:
        raise arguments.wrong("keep", keep, wanted)
    return found


def _reordered(ranked: list[Ranking], scored: ScoredPairs, stage: int) -> list[Ranking]:
    """A stage's order of the documents that it scored, the first ones, and then the others."""
    first = [
        replace(
            ranked[place],
            score=float(scored.scores[place]),
            logit=float(scored.logits[place]),
            truncated=scored.best[place].truncated,
            part=scored.best[place].part,
            scored=True,
            stage=stage,
        )
        for place in scored.order
    ]
    return first + ranked[len(scored) :]
