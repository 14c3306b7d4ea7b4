"""The end of a ranking: logits of model inputs -> documents, the best first."""

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
    """The pairs of a call that were scored: the first n, in the order they were given.

    Attributes:
        best: each one's model input; of several parts the one with the highest logit, the first of
            equals.
        logits: of those; shape [n].
        scores: after the activation; shape [n].
    """

    best: list[ModelInput]
    logits: Logits
    scores: Scores

    @classmethod
    def of(
        cls, inputs: Sequence[ModelInput], logits: Logits, activate: Callable[[Logits], Scores]
    ) -> ScoredPairs:
        """Take each pair of which all parts were scored.

        Args:
            inputs: of the first pairs or of all, in their order.
            logits: of the first inputs or of all: the rest was not scored.
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
        """Places of the pairs, the most relevant first; equal ones keep their order.

        By logits: scores may tie where an activation saturates.
        """
        order: list[int] = np.argsort(-self.logits, kind="stable").tolist()
        return order


@dataclass(frozen=True)
class Ranking:
    """One document of a ranked list.

    Attributes:
        index: its place in the list the caller gave, from 0.
        score: relevance, after the family's activation.
        logit: relevance as the model gives it; order and ties are decided on it.
        text: the document.
        truncated: whether the model read its beginning, or its end, only.
        part: the characters [start, end) that scored best, where it was cut into chunks.
        scored: whether the time sufficed; if not, score and logit are NaN.
    """

    index: int
    score: float
    logit: float
    text: str
    truncated: bool = False
    part: tuple[int, int] | None = None
    scored: bool = True

    def __eq__(self, other: object) -> bool:
        """Whether all is the same: two that were not scored, and have no numbers, may be equal."""
        return self._known() == other._known() if isinstance(other, Ranking) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._known())

    def __repr__(self) -> str:
        """Without what is as usual, and with a long text's ends alone."""
        numbers = (
            f"score={self.score:.6g}, logit={self.logit:.6g}" if self.scored else "scored=False"
        )
        more = ", truncated=True" if self.truncated else ""
        more += f", part={self.part}" if self.part else ""
        return f"Ranking(index={self.index}, {numbers}, text={_SHORT.repr(self.text)}{more})"

    def _known(self) -> tuple[object, ...]:
        known = (self.index, self.text, self.truncated, self.part)
        return (*known, self.score, self.logit) if self.scored else known


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


class Rankings(list[Ranking]):
    """A ranked list; so is a slice of it, or a copy. Equal to any list of the same.

    Attributes:
        scored_count: how many of the documents were scored: all but for a budget.
    """

    def __init__(self, ranked: Iterable[Ranking] = (), scored_count: int = 0) -> None:
        super().__init__(ranked)
        self.scored_count = scored_count

    @classmethod
    def of(cls, found: ScoredPairs, documents: Sequence[str]) -> Rankings:
        """All documents of a query: those that were scored, then the others in their order."""
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
        return found if isinstance(found, Ranking) else Rankings(found, self.scored_count)

    def copy(self) -> Rankings:
        """See `list`."""
        return self[:]

    def __repr__(self) -> str:
        return f"Rankings({super().__repr__()}, scored_count={self.scored_count})"
