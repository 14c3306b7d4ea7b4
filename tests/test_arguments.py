"""Arguments of the public API: types and ranges, and texts in any kind of container."""

import asyncio
import copy
import os
import pickle
import threading
from collections import Counter, OrderedDict, UserDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import qrank.bundle.locate
import qrank.measure.bench
import qrank.measure.tuning
import qrank.reranker
from qrank import Ranking, Reranker, tune
from qrank.errors import InputError
from qrank.scoring.arguments import size
from qrank.scoring.ranking import Rankings

QUERY = "which planet is red?"
DOCUMENTS = ["mars is the red planet", "bread is baked in an oven", ""]


@pytest.fixture(scope="module")
def mini() -> Iterator[Reranker]:
    """The bundled model."""
    with Reranker("mini") as reranker:
        yield reranker


# By type and range


WHOLE = [True, 2.0, "2", -1, b"2", [2], float("nan"), np.float32(2), np.array([2, 3]), np.True_]
NUMBER = [True, "2", float("nan"), float("inf"), [2.0], 1j]
TEXT = [3, b"x", ["x"], True]

OPENING: dict[str, list[Any]] = {
    "model": [None, 3, "", b"mini", ["mini"]],
    "backend": TEXT,
    "device": TEXT,
    "threads": [*WHOLE, 0],
    "compute_dtype": TEXT,
    "max_batch_tokens": [*WHOLE, 0],
    "max_memory": [True, 2.0, "2X", "", "G", 0, -1, "0", "0G", b"2G", "-2G", "9" * 400],
    "max_length": [*WHOLE, 0],
    "revision": [3, b"x", True],
    "convert": [1, "yes", None],
    "family": [3, b"x", "", ["x"]],
    "policy": [None, 3, "quickest", ["fastest"]],
    "min_kendall": [*NUMBER, 1.5, -2],
    "max_loss": NUMBER,
    "profile": [None, 3, "huge", ["short"]],
    "calibrated": [None, 1, "yes"],
}
RANKING: dict[str, list[Any]] = {
    "query": [None, 3, b"q", ["q"]],
    "documents": [None, 3, "one string", b"bytes", object(), 1.5],
    "text_key": [None, 3, b"x", ["x"]],
    "top_k": WHOLE,
    "instruction": TEXT,
    "long_documents": [None, 3, "drop", ["tail"]],
    "budget_ms": [*NUMBER, 0, -1],
}
SCORING: dict[str, list[Any]] = {
    "pairs": [None, 3, "one string", b"bytes", object()],
    "raw": [None, 1, "no"],
    "instruction": TEXT,
    "long_documents": [None, 3, "drop", ["tail"]],
}
TUNING: dict[str, list[Any]] = {
    "model": [None, 3],
    "threads": [*WHOLE, 0],
    "timeout": [*NUMBER, 0, -1],
    "progress": [None, 3],
}
BENCH: dict[str, list[Any]] = {
    "model": [None, 3],
    "texts": [3, "one string", {"a": "b"}],
    "query": TEXT,
    "threads": [*WHOLE, 0],
    "backends": [None, "onnx", {"onnx"}],
    "seconds": [None, *NUMBER, -1],
    "progress": [None, 3],
}


def cases(arguments: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{value!r:.20}")
        for name, values in arguments.items()
        for value in values
    ]


def refused(call: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{name}\b.*(give|not) ") as caught:
        call(**{name: value})
    assert len(str(caught.value)) < 250


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything looks for a model."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something is loaded before the arguments are checked")

    for module in (qrank.reranker, qrank.measure.tuning, qrank.measure.bench):
        monkeypatch.setattr(module, "obtain", never)


@pytest.mark.parametrize(("name", "value"), cases(OPENING))
@pytest.mark.usefixtures("nothing_is_loaded")
def test_what_a_reranker_is_not_opened_with(name: str, value: object) -> None:
    refused(Reranker, name, value)


@pytest.mark.parametrize(("name", "value"), cases(RANKING))
def test_what_rank_does_not_take(mini: Reranker, name: str, value: object) -> None:
    usual = {"query": QUERY, "documents": DOCUMENTS}
    refused(lambda **given: mini.rank(**{**usual, **given}), name, value)


@pytest.mark.parametrize(("name", "value"), cases(SCORING))
def test_what_score_does_not_take(mini: Reranker, name: str, value: object) -> None:
    usual: dict[str, Any] = {"pairs": [(QUERY, DOCUMENTS[0])]}
    refused(lambda **given: mini.score(**{**usual, **given}), name, value)


@pytest.mark.parametrize(("name", "value"), cases(TUNING))
@pytest.mark.usefixtures("nothing_is_loaded")
def test_what_tune_does_not_take(name: str, value: object) -> None:
    refused(tune, name, value)


@pytest.mark.parametrize(("name", "value"), cases(BENCH))
@pytest.mark.usefixtures("nothing_is_loaded")
def test_what_bench_does_not_take(name: str, value: object) -> None:
    refused(qrank.measure.bench.bench, name, value)


def test_a_query_and_a_document_are_told_to_be_a_pair(mini: Reranker) -> None:
    for more in (["d"], [["d1", "d2"]], ["d", True]):
        with pytest.raises(InputError, match=r"score\(\[\(query, document\), \.\.\.\]\).*rank\("):
            mini.score("q", *more)


def test_numbers_of_numpy_are_numbers(mini: Reranker) -> None:
    two: Any = np.int64(2)
    long: Any = np.float32(1e5)
    assert len(mini.rank(QUERY, DOCUMENTS, top_k=two, budget_ms=long)) == 2
    assert mini.score([(QUERY, "a")], raw=np.True_).dtype == np.float32  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512M", 2**29), ("1.5 GiB", 3 * 2**29), ("2g", 2**31), (" 7 ", 7), ("3kb", 3072)],
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert size(text) == expected


def test_memory_may_be_a_size(mini: Reranker) -> None:
    with Reranker("mini", max_memory="2G") as bounded:
        assert bounded.rank(QUERY, DOCUMENTS) == mini.rank(QUERY, DOCUMENTS)


# Texts in any container


class Series:
    """Like pandas': items by label, none of which is 0."""

    def __init__(self, values: list[Any]) -> None:
        self._values = {f"row {i}": value for i, value in enumerate(values)}

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, label: str) -> Any:
        return self._values[label]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values.values())


class Scalar:
    """Like Arrow's: not a value itself, but `as_py` returns it."""

    def __init__(self, value: object) -> None:
        self._value = value

    def as_py(self) -> object:
        return self._value


class Rows:
    """A container that can be iterated only by integer index."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __getitem__(self, place: int) -> Any:
        return self._values[place]


class Frame:
    """A table: iterating over it yields its column names."""

    columns = ("query", "document")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


class Word(str):
    """A string with its own `__str__`."""

    def __str__(self) -> str:
        return f"a word: {super().__str__()}"


HELD: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "generator": iter,
    "array": np.array,
    "array of objects": lambda values: np.array(values, object),
    "keys": lambda values: dict.fromkeys(map(_hashable, values)).keys(),
    "values": lambda values: dict(enumerate(values)).values(),
    "series": Series,
    "rows": Rows,
    "column": lambda values: [Scalar(value) for value in values],
    "pandas": lambda values: pytest.importorskip("pandas").Series(
        values, index=range(9, 9 - len(values), -1)
    ),
    "datasets": lambda values: pytest.importorskip("datasets").Dataset.from_dict({"x": values})[
        "x"
    ],
}
"""Containers of texts, or of pairs of texts."""


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("held", HELD)
def test_documents_may_be_held_in_any_way(mini: Reranker, held: str) -> None:
    ranking = mini.rank(QUERY, HELD[held](DOCUMENTS))
    assert ranking == mini.rank(QUERY, DOCUMENTS)
    assert {type(item.text) for item in ranking} == {str}


def test_documents_may_be_dictionaries_with_a_text(mini: Reranker) -> None:
    records = [{"id": i, "body": text} for i, text in enumerate(DOCUMENTS)]
    expected = mini.rank(QUERY, DOCUMENTS)
    assert mini.rank(QUERY, iter(records), text_key="body") == expected
    mixed: list[Any] = [
        {"text": DOCUMENTS[0]},
        DOCUMENTS[1],
        MappingProxyType({"text": Scalar("")}),
    ]
    assert mini.rank(QUERY, mixed) == expected


@pytest.mark.parametrize("held", HELD)
def test_pairs_may_be_held_in_any_way(mini: Reranker, held: str) -> None:
    pairs = [[QUERY, document] for document in DOCUMENTS]
    np.testing.assert_array_equal(mini.score(HELD[held](pairs)), mini.score(pairs))
    rows: list[Any] = [tuple, np.array, Series, iter, lambda pair: list(map(Scalar, pair))]
    for row in rows:
        np.testing.assert_array_equal(mini.score([row(pair) for pair in pairs]), mini.score(pairs))


def test_texts_that_are_more_than_strings_become_plain_ones(mini: Reranker) -> None:
    for kind in (np.str_, Word, Scalar):
        (item,) = mini.rank(kind("red"), [kind("mars")])  # type: ignore[arg-type, list-item]
        assert type(item.text) is str
        assert (item.text, item.logit) == ("mars", mini.rank("red", ["mars"])[0].logit)


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter, MappingProxyType, UserDict])
def test_a_mapping_is_not_ranked_by_its_keys(mini: Reranker, kind: Any) -> None:
    with pytest.raises(InputError, match=rf"{kind.__name__}, .*keys.*list\(documents.values\(\)\)"):
        mini.rank("red", kind({"k1": "mars is red", "k2": "bread"}))
    with pytest.raises(InputError, match=rf"{kind.__name__}, .*keys.*list\(pairs.items\(\)\)"):
        mini.score(kind({"red": "mars is red"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mars", "bread"}, "is a set, which has no order"),
        (frozenset({"mars"}), "is a frozenset, which has no order"),
        (Frame(), "is a Frame, which would be read by its columns.*one column, or the rows"),
    ],
)
def test_what_is_iterated_by_something_else_is_refused(
    mini: Reranker, values: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"documents {message}"):
        mini.rank("red", values)
    with pytest.raises(InputError, match=f"pairs {message}"):
        mini.score(values)


@pytest.mark.parametrize("pair", ["qd", b"qd", {"q": "d"}, {"q", "d"}, 7, Scalar({"q": 1, "d": 2})])
def test_a_pair_is_not_what_only_happens_to_have_two_parts(mini: Reranker, pair: Any) -> None:
    with pytest.raises(InputError, match=r"pair 1 is no \(query, document\) pair"):
        mini.score([("q", "d"), pair])


# Results


def ranking(index: int = 0, **more: Any) -> Ranking:
    return Ranking(**{"index": index, "score": 0.5, "logit": 0.25, "text": "mars", **more})


def test_rankings_are_equal_where_all_is_the_same() -> None:
    same = [ranking(), ranking(1, score=float("nan"), logit=float("nan"), scored=False)]
    other = [ranking(), ranking(1, score=-float("nan"), logit=float("nan"), scored=False)]
    assert same == other
    assert len({*same, *other}) == 2
    assert Rankings(same, 1) == other == pickle.loads(pickle.dumps(Rankings(same, 1)))
    for change in ({"score": 0.6}, {"logit": 1.0}, {"text": "x"}, {"part": (0, 1)}, {"index": 3}):
        assert ranking(**change) != ranking()
    assert ranking() != (0, 0.5, 0.25, "mars", False, None, True)


def test_a_slice_of_rankings_knows_what_was_scored() -> None:
    whole = Rankings([ranking(i) for i in range(5)], 3)
    for part in (whole[:2], whole[::-1], whole.copy(), copy.copy(whole), copy.deepcopy(whole)):
        assert type(part) is Rankings
        assert part.scored_count == 3
    assert whole[1:3] == [ranking(1), ranking(2)]
    assert whole[-1] == ranking(4)


def test_a_ranking_shows_what_matters_in_a_line() -> None:
    assert repr(ranking()) == "Ranking(index=0, score=0.5, logit=0.25, text='mars')"
    shown = repr(ranking(text="long " * 10**6, truncated=True, part=(0, 9)))
    assert len(shown) < 200
    assert shown.endswith(", truncated=True, part=(0, 9))")
    assert "nan" not in repr(ranking(score=float("nan"), logit=float("nan"), scored=False))
    assert repr(Rankings([ranking()], 1)) == f"Rankings([{ranking()!r}], scored_count=1)"


# Awaited


def test_what_is_awaited_leaves_the_event_loop_free(mini: Reranker) -> None:
    """The documents come once the loop has gone on."""

    async def ask() -> tuple[Rankings, Any]:
        free = threading.Event()

        def when_free(values: list[Any]) -> Iterator[Any]:
            assert free.wait(60), "the event loop is blocked"
            yield from values

        asyncio.get_running_loop().call_later(0.01, free.set)
        more: dict[str, Any] = {"top_k": 2, "long_documents": "chunk", "budget_ms": 1e5}
        ranked = mini.arank(QUERY, when_free([{"x": d} for d in DOCUMENTS]), text_key="x", **more)
        pairs = [(QUERY, document) for document in DOCUMENTS]
        scored = mini.ascore(when_free(pairs), raw=True, long_documents="chunk")
        return await asyncio.gather(ranked, scored)

    ranked, logits = asyncio.run(ask())
    assert ranked == mini.rank(QUERY, DOCUMENTS, top_k=2)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, mini.score([(QUERY, d) for d in DOCUMENTS], raw=True))


def test_what_is_awaited_raises_what_the_call_would(mini: Reranker) -> None:
    with pytest.raises(InputError, match="documents is one string"):
        asyncio.run(mini.arank(QUERY, "one string"))
    with pytest.raises(InputError, match="take no instruction"):
        asyncio.run(mini.ascore([(QUERY, "a")], instruction="find planets"))


# Copies, in this process and in others


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_a_copy_is_opened_with_the_same_arguments(copied: Callable[[Reranker], Reranker]) -> None:
    with Reranker(
        "mini", threads=1, max_length=64, max_memory="1G", max_batch_tokens=400
    ) as reranker:
        before = reranker.rank(QUERY, ["mars " * 99, "red"])
        twin = copied(reranker)
    with twin:
        assert twin is not reranker
        assert (twin.engine.threads, twin.engine.max_length) == (1, 64)
        assert (twin.target, twin.choice.options.max_batch_tokens) == (reranker.target, 400)
        assert twin.rank(QUERY, ["mars " * 99, "red"]) == before


def test_a_pool_of_processes_ranks_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: Reranker
) -> None:
    """With spawn, in another folder: the model's relative path still resolves as it did here."""
    folder = qrank.bundle.locate.bundled()["mini"]
    monkeypatch.chdir(folder.parent)
    reranker = Reranker(folder.name)
    with ProcessPoolExecutor(
        1, get_context("spawn"), initializer=os.chdir, initargs=(str(tmp_path),)
    ) as pool:
        there = pool.submit(reranker.rank, QUERY, DOCUMENTS).result(120)
    assert there == mini.rank(QUERY, DOCUMENTS)
    assert there.scored_count == 3


def test_joblib_ranks_in_its_processes(mini: Reranker) -> None:
    joblib = pytest.importorskip("joblib")
    rank = joblib.delayed(Reranker("mini", threads=1).rank)
    found = joblib.Parallel(n_jobs=2)(rank(QUERY, [text]) for text in DOCUMENTS[:2])
    assert found == [mini.rank(QUERY, [text]) for text in DOCUMENTS[:2]]
    joblib.externals.loky.get_reusable_executor().shutdown()
