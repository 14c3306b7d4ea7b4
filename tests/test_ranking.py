"""The last step of a ranking: each document's best part, unscored documents, and the order."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qrank.scoring.inputs import ModelInput
from qrank.scoring.ranking import Rankings, ScoredPairs
from qrank.serve.request import RerankOutcome

NOTHING = np.empty(0, np.int32)

PARTS = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=4), min_size=1, max_size=12)
"""The logits of each document's parts: few distinct values, so that many are equal."""


def inputs_of(parts: list[list[int]]) -> list[ModelInput]:
    return [
        ModelInput(owner, NOTHING, NOTHING, None, owner % 3 == 0, (place, place + 1))
        for owner, logits in enumerate(parts)
        for place in range(len(logits))
    ]


def scored(parts: list[list[int]], count: int | None = None) -> ScoredPairs:
    """Score the first `count` inputs, or all if None."""
    logits = np.array([logit for each in parts for logit in each], np.float32)[:count]
    return ScoredPairs.of(inputs_of(parts), logits, lambda x: 2 * x.astype(np.float64))


@given(PARTS)
def test_a_document_is_worth_its_best_part_the_first_of_equals(parts: list[list[int]]) -> None:
    found = scored(parts)
    assert found.logits.tolist() == [max(each) for each in parts]
    assert found.scores.tolist() == [2 * max(each) for each in parts]
    assert [each.part for each in found.best] == [
        (place, place + 1) for place in (each.index(max(each)) for each in parts)
    ]
    order = found.order
    assert sorted(order) == list(range(len(parts)))
    assert order == sorted(order, key=lambda place: (-max(parts[place]), place))


@given(PARTS, st.data())
def test_a_document_with_a_part_that_was_not_scored_is_not_scored(
    parts: list[list[int]], data: st.DataObject
) -> None:
    ends = np.cumsum([len(each) for each in parts])
    count = data.draw(st.integers(0, int(ends[-1])))
    assert len(scored(parts, count)) == (ends <= count).sum()


def test_both_doors_put_what_was_not_scored_last() -> None:
    """With NaN in Python, and over HTTP with the lowest score of the others."""
    parts = [[1], [3], [2], [9], [9]]
    found = scored(parts, 3)
    ranked = Rankings.of(found, ["a", "b", "c", "d", "e"])
    assert [each.index for each in ranked] == [1, 2, 0, 3, 4]
    assert [each.truncated for each in ranked] == [False, False, True, False, False]
    assert ranked.scored_count == 3
    assert all(math.isnan(each.logit) and math.isnan(each.score) for each in ranked[3:])
    outcome = RerankOutcome.of("m", 5, inputs_of(parts), found, tokens=7, seconds=0.5)
    assert outcome.order == [1, 2, 0, 3, 4]
    assert outcome.logits == [1, 3, 2, 1, 1]
    assert outcome.scores == [2, 6, 4, 2, 2]
    assert outcome.scored == [True] * 3 + [False] * 2
    assert outcome.truncated == [True, False, False, True, False]
