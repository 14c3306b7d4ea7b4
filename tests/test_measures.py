"""Measures and differences, compared with scipy and tested by properties."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from qrank.quality.metrics import MEASURES, Difference, kendall, measure, overlap

VALUES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30)


@given(VALUES)
@example([(0.0, 0.0), (0.0, 5e-324)])
def test_a_difference_is_scipys(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = np.array(pairs).T
    found = Difference.of(ours, theirs)
    gains = ours - theirs
    assert found.mean == pytest.approx(gains.mean())
    assert found.margin is not None
    assert found.p is not None
    assert 0 <= found.p <= 1
    if np.ptp(gains) < 1e-6:
        assert found.margin < 1e-5
        return
    margin = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    assert found.margin == pytest.approx(margin)
    assert found.p == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
    swapped = Difference.of(theirs, ours)
    assert (swapped.mean, swapped.p) == pytest.approx((-found.mean, found.p))


def test_a_difference_of_one_pair_has_no_interval() -> None:
    assert Difference.of(np.array([0.5]), np.array([0.25])) == Difference(0.25, None, None)


LOGITS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20)


@given(LOGITS)
def test_kendall_is_scipys(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = np.array(pairs, np.float32).T
    found = kendall({"q": ours, "one": ours[:1]}, {"q": theirs, "one": theirs[:1]})
    if np.ptp(ours) and np.ptp(theirs):
        assert found == pytest.approx(stats.kendalltau(ours, theirs).statistic)
    else:
        assert found == 0


def test_overlap_by_hand() -> None:
    ours = {"a": [str(i) for i in range(20)], "b": ["x", "y"], "none": []}
    theirs = {"a": [str(i) for i in range(5, 25)], "b": ["y", "x"], "none": []}
    assert overlap(ours, theirs) == pytest.approx((0.5 + 1) / 2)
    assert overlap(ours, theirs, top=1) == 0
    assert overlap(ours, theirs, top=1, within=2) == 0.5
    assert overlap({"none": []}, {"none": []}) is None


ORDERS = st.lists(st.permutations([f"d{i}" for i in range(6)]), min_size=1, max_size=4)


@given(ORDERS, st.data())
def test_measures_of_any_order(orders: list[list[str]], draw: st.DataObject) -> None:
    """Ids do not break ties, and the best order scores 1."""
    relevance = st.dictionaries(
        st.sampled_from(orders[0]), st.integers(0, 3), min_size=1, max_size=6
    )
    order = {f"q{i}": documents for i, documents in enumerate(orders)}
    qrels = {query: draw.draw(relevance) for query in order}
    found = measure(qrels, order)
    assert list(found) == list(MEASURES)
    assert all(((v >= 0) & (v <= 1)).all() for v in found.values())
    best = {q: sorted(d, key=lambda x: -qrels[q].get(x, 0)) for q, d in order.items()}
    ideal = [float(any(qrels[q].values())) for q in order]
    assert measure(qrels, best)["nDCG@10"].tolist() == pytest.approx(ideal)
