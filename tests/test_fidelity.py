"""The fidelity measures of a conversion, compared with scipy's and tested by properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tables import tolerances

from qrank.bundle.fidelity import EIGHT_BITS, Fidelity, Tolerance

# Few distinct values, so that ties are common.
TIED = st.integers(-4, 4).map(float)
ANY = st.floats(-1e3, 1e3, width=32)
Floats = NDArray[np.float64]


@st.composite
def two_lists(draw: st.DrawFn) -> tuple[Floats, Floats]:
    size = draw(st.integers(2, 40))
    values = draw(st.sampled_from([TIED, ANY]))
    one = st.lists(values, min_size=size, max_size=size).map(np.array)
    return draw(one), draw(one)


@given(two_lists())
def test_rank_correlations_are_scipys(lists: tuple[Floats, Floats]) -> None:
    a, b = lists
    found = Fidelity.of(a, b)
    if len(np.unique(a)) == 1 or len(np.unique(b)) == 1:
        # scipy returns NaN: without a ranking, nothing is proven.
        assert (found.spearman, found.kendall) == (0.0, 0.0)
    else:
        assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)
        assert found.kendall == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-9)


@given(two_lists())
def test_differences_and_spread(lists: tuple[Floats, Floats]) -> None:
    a, b = lists
    found = Fidelity.of(a, b)
    assert found.max_abs == max(abs(x - y) for x, y in zip(a, b, strict=True))
    assert found.spread == max(b) - min(b)
    assert found.max_abs == Fidelity.of(b, a).max_abs


@given(two_lists())
def test_rank_correlations_see_the_order_alone(lists: tuple[Floats, Floats]) -> None:
    a, b = lists
    found, scaled, mirrored = Fidelity.of(a, b), Fidelity.of(4 * a, b), Fidelity.of(-a, b)
    assert (scaled.spearman, scaled.kendall) == pytest.approx((found.spearman, found.kendall))
    assert (mirrored.spearman, mirrored.kendall) == pytest.approx((-found.spearman, -found.kendall))


@given(two_lists())
def test_a_perfect_copy_reaches_every_bar(lists: tuple[Floats, Floats]) -> None:
    a, _ = lists
    found = Fidelity.of(a, a)
    if len(np.unique(a)) > 1:
        assert (found.spearman, found.kendall) == pytest.approx((1, 1))
        for tolerance in tolerances().values():
            assert tolerance.shortfall(found) is None


def test_a_tolerance_scales_with_the_spread_from_one_on() -> None:
    tolerance = Tolerance(0.1)
    assert tolerance.shortfall(Fidelity(0.1, 0.01, 1, 1)) is None
    assert tolerance.shortfall(Fidelity(0.9, 10.0, 1, 1)) is None
    missed = tolerance.shortfall(Fidelity(1.5, 10.0, 1, 1))
    assert missed == "max |Δlogit| is 1.5, at most 1 allowed"


def test_both_bars_are_told_when_both_are_missed() -> None:
    missed = EIGHT_BITS.shortfall(Fidelity(2.0, 1.0, 0.5, 0.25))
    assert missed is not None
    assert "max |Δlogit| is 2, at most 0.15 allowed" in missed
    assert "Kendall tau is 0.250, at least 0.900 needed" in missed


@pytest.mark.parametrize("precision", tolerances())
def test_nan_misses_the_bar(precision: str) -> None:
    """Every comparison with NaN is false, so an inverted comparison would let NaN pass."""
    reference = np.linspace(-3, 3, 30)
    logits = reference.copy()
    logits[4] = np.nan
    missed = tolerances()[precision].shortfall(Fidelity.of(logits, reference))
    assert missed is not None
    assert "nan" in missed
