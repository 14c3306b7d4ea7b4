"""The last step of a ranking: logits of model inputs -> documents, the best first."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, overload

import numpy as np

from qrank.bundle.sequences import Logits
from qrank.scoring.activation import Scores
from qrank.scoring.inputs import ModelInput


@dataclass(frozen=True)
class ScoredPairs:
    """The scored pairs of a call: the first n, in the given order.

    Attributes:
        best: each pair's model input; of several parts, the (first) one with the highest logit.
        logits: of those inputs; shape [n].
        scores: after the activation; shape [n].
    """

    best: list[ModelInput]
    logits: Logits
    scores: Scores

    @classmethod
    def of(
        cls, inputs: Sequence[ModelInput], logits: Logits, activate: Callable[[Logits], Scores]
    ) -> ScoredPairs:
        """Take every pair all of whose parts were scored.

        Args:
            inputs: of all pairs or only the first ones, in order.
            logits: of all inputs or only the first ones; the others were not scored.
            activate: logits -> scores.
        """
        unscored = inputs[len(logits)].owner if len(logits) < len(inputs) else None
        places: dict[int, int] = {}
        for place, logit in enumerate(logits):
            owner = inputs[place].owner
            if owner != unscored and (owner not in places or logit > logits[places[owner]]):
                places[owner] = place
        best = logits[list(places.values())]
        return cls([inputs[place] for place in places.values()], best, activate(best))

    def __len__(self) -> int:
        return len(self.best)

    @property
    def order(self) -> list[int]:
        """Indices of the pairs, the most relevant first; ties keep their order.

        Sorted by logits, as scores may tie if the activation saturates.
        """
        order: list[int] = np.argsort(-self.logits, kind="stable").tolist()
        return order


@dataclass(frozen=True)
class Ranking:
    """One document of a ranked list.

    Attributes:
        index: its position in the caller's list, from 0.
        score: relevance, after the family's activation.
        logit: raw relevance from the model; it determines order and ties.
        text: the document.
        truncated: whether the model read only its beginning, or its end.
        part: the characters [start, end) that scored best, if it was cut into chunks.
        scored: whether it was scored in time; if not, score and logit are NaN.
        stage: the reranker of a `Cascade` that scored it last, from 0; None: there is no cascade,
            or it was not scored. Scores of different stages cannot be compared.
    """

    index: int
    score: float
    logit: float
    text: str
    truncated: bool = False
    part: tuple[int, int] | None = None
    scored: bool = True
    stage: int | None = None

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; the NaN scores of unscored documents are ignored."""
        return self._known() == other._known() if isinstance(other, Ranking) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._known())

    def __repr__(self) -> str:
        """A short form: fields with default values left out, long texts abbreviated."""
        numbers = (
            f"score={self.score:.6g}, logit={self.logit:.6g}" if self.scored else "scored=False"
        )
        more = ", truncated=True" if self.truncated else ""
        more += f", part={self.part}" if self.part else ""
        more += "" if self.stage is None else f", stage={self.stage}"
        return f"Ranking(index={self.index}, {numbers}, text={_SHORT.repr(self.text)}{more})"

    def _known(self) -> tuple[object, ...]:
        known = (self.index, self.text, self.truncated, self.part, self.stage)
        return (*known, self.score, self.logit) if self.scored else known


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


class Rankings(list[Ranking]):
    """A ranked list; slices and copies are `Rankings` too. Equal to any list of equal items.

    Attributes:
        scored_count: number of documents that were scored: all of them, unless a budget ran out.
        stage_counts: number of documents that each reranker of a `Cascade` scored; () if there is
            no cascade.
    """

    def __init__(
        self,
        ranked: Iterable[Ranking] = (),
        scored_count: int = 0,
        stage_counts: tuple[int, ...] = (),
    ) -> None:
        super().__init__(ranked)
        self.scored_count = scored_count
        self.stage_counts = stage_counts

    @classmethod
    def of(cls, found: ScoredPairs, documents: Sequence[str]) -> Rankings:
        """All documents of a query: the scored ones ranked, then the others in their order."""
        ranked = [
            Ranking(
                index=place,
                score=float(found.scores[place]),
                logit=float(found.logits[place]),
                text=documents[place],
                truncated=found.best[place].truncated,
                part=found.best[place].part,
            )
            for place in found.order
        ]
        for place in range(len(found), len(documents)):
            ranked.append(Ranking(place, math.nan, math.nan, documents[place], scored=False))
        return cls(ranked, len(found))

    @overload
    def __getitem__(self, place: SupportsIndex) -> Ranking: ...

    @overload
    def __getitem__(self, place: slice) -> Rankings: ...

    def __getitem__(self, place: SupportsIndex | slice) -> Ranking | Rankings:
        found = super().__getitem__(place)
        if isinstance(found, Ranking):
            return found
        return Rankings(found, self.scored_count, self.stage_counts)

    def copy(self) -> Rankings:
        """See `list`."""
        return self[:]

    def __repr__(self) -> str:
        counts = f"scored_count={self.scored_count}"
        if self.stage_counts:
            counts += f", stage_counts={self.stage_counts}"
        return f"Rankings({super().__repr__()}, {counts})"
