"""The rules that every integration keeps, whatever its library (docs/integrations.md)."""

import copy
import pickle
from collections.abc import Iterator

import pytest
from hosts import HOSTS, OPTIONS, Host

from qrank import Reranker

QUERY = "which planet is red?"
RED = "mars is called the red planet"
TEXTS = [
    "bread is baked in a hot oven",
    RED,
    "venus is the hottest planet",
    "bread is baked in a hot oven",
    RED,
    "a planet is red if its dust holds iron, as that of mars does",
]
"""Two of them twice: ties."""

TAKE_A_NUMBER = ["cross_encoder", "langchain", "llama_index", "haystack"]
"""Of documents to keep; around the others, the library does that."""

TAKE_A_BUDGET = ["langchain", "llama_index", "haystack", "lancedb"]


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    package, describe = HOSTS[request.param]
    if package is not None:
        pytest.importorskip(package)
    return describe()


@pytest.fixture(scope="module")
def expected() -> Iterator[list[tuple[int, float]]]:
    """Positions and scores, as `Reranker.rank` gives them."""
    with Reranker("mini", **OPTIONS) as reranker:
        yield [(each.index, each.score) for each in reranker.rank(QUERY, TEXTS)]


def test_the_order_is_that_of_rank_and_the_callers_documents_stay(
    host: Host, expected: list[tuple[int, float]]
) -> None:
    order = [place for place, _ in expected]
    assert order.index(1) + 1 == order.index(4), "ties keep their order"
    documents = host.documents(TEXTS)
    before = copy.deepcopy(documents)
    found = host.run(host.make(None, None), QUERY, documents)
    assert [place for place, _ in found] == order
    if host.scored:
        assert {type(score) for _, score in found} == {float}
        # LanceDB's column is float32.
        assert [score for _, score in found] == pytest.approx([x for _, x in expected], rel=1e-6)
    assert documents == before


@pytest.mark.parametrize("host", TAKE_A_NUMBER, indirect=True)
@pytest.mark.parametrize("top_n", [0, 2, 99])
def test_the_best_are_kept(host: Host, expected: list[tuple[int, float]], top_n: int) -> None:
    found = host.run(host.make(top_n, None), QUERY, host.documents(TEXTS))
    assert [place for place, _ in found] == [place for place, _ in expected[:top_n]]


def test_nothing_gives_nothing(host: Host) -> None:
    assert host.run(host.make(None, None), QUERY, host.documents([])) == []


@pytest.mark.parametrize("host", TAKE_A_BUDGET, indirect=True)
def test_what_a_budget_left_unscored_comes_last_without_a_score(host: Host) -> None:
    found = host.run(host.make(None, 0.001), QUERY, host.documents(TEXTS))
    (first, score), *others = found
    assert first == 0
    assert score is not None
    assert others == [(place, None) for place in range(1, len(TEXTS))]


def test_copies_and_stored_ones_do_the_same(host: Host) -> None:
    documents = host.documents(TEXTS)
    made = host.make(3, None)
    expected = host.run(made, QUERY, documents)
    ways = [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
    for way in [*ways, host.stored] if host.stored else ways:
        again = way(made)
        assert again is not made
        assert host.run(again, QUERY, documents) == expected


@pytest.mark.parametrize("name", ["langchain", "llama_index", "haystack"])
def test_a_changed_copy_opens_what_it_names(name: str) -> None:
    package, describe = HOSTS[name]
    pytest.importorskip(str(package))
    host = describe()
    made = host.make(None, None)
    whole = host.run(made, QUERY, host.documents([f"{'bread ' * 99}{RED}"]))
    changed = copy.copy(made)
    changed.options = {**OPTIONS, "max_length": 32}
    cut = host.run(changed, QUERY, host.documents([f"{'bread ' * 99}{RED}"]))
    assert cut != whole
    assert host.run(made, QUERY, host.documents([f"{'bread ' * 99}{RED}"])) == whole
