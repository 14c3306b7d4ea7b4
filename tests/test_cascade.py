"""Cascades: which documents each stage scores, their order, one budget for all, early exit."""

import asyncio
import json
import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from judged import Data

from qrank import Cascade, Reranker
from qrank.cli import main
from qrank.errors import InputError
from qrank.quality.cascade_evaluation import cascaded
from qrank.quality.rerank_run import falling
from qrank.scoring.early_exit import EarlyExit
from qrank.scoring.ranking import Ranking

DOCUMENTS = st.lists(st.integers(0, 30).map(lambda n: "a " * n), max_size=25)


@pytest.fixture(scope="module")
def models() -> Iterator[list[Reranker]]:
    """Three rerankers that disagree: longer is better, one of 97 logits, shorter is better."""
    names = ("length", "scrambled", "shortness")
    opened = [Reranker("mini", backend=f"fakes:{name}") for name in names]
    yield opened
    for each in opened:
        each.close()


def plain(ranking: list[Ranking]) -> list[tuple[int, float]]:
    return [(item.index, item.logit) for item in ranking]


# Which documents, and their order


@settings(max_examples=50)
@given(documents=DOCUMENTS, keep=st.integers(0, 30), top_k=st.none() | st.integers(0, 30))
def test_the_first_ones_best_are_ranked_by_the_second(
    models: list[Reranker], documents: list[str], keep: int, top_k: int | None
) -> None:
    small, large = models[:2]
    found = Cascade(models[:2], keep).rank("q", documents, top_k=top_k)
    by_small, by_large = (each.rank("q", documents) for each in (small, large))
    kept = [item.index for item in by_small[:keep]]
    chosen = small.rank("q", documents)[:keep]
    again = large.rank("q", [item.text for item in chosen])
    expected = [(kept[item.index], item.logit) for item in again] + plain(by_small[keep:])
    assert plain(found) == expected[:top_k]
    count = min(keep, len(documents))
    assert [item.stage for item in found] == ([1] * count + [0] * len(documents))[: len(found)]
    assert found.scored_count == len(documents)
    assert found.stage_counts == (len(documents), count)
    if keep >= len(documents):  # and equal ones keep the order of the first
        assert sorted(plain(found)) == sorted(plain(by_large)[:top_k]) or top_k is not None
        assert [item.logit for item in found] == [item.logit for item in by_large[:top_k]]
    if keep == 0:
        assert plain(found) == plain(by_small[:top_k])


@settings(max_examples=30)
@given(documents=DOCUMENTS, keep=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_three_stages_are_two_after_the_first(
    models: list[Reranker], documents: list[str], keep: tuple[int, int]
) -> None:
    more, fewer = max(keep), min(keep)
    found = Cascade(models, [more, fewer]).rank("q", documents)
    two = Cascade(models[:2], more).rank("q", documents)
    last = models[2].rank("q", [item.text for item in two[:fewer]])
    expected = [(two[item.index].index, item.logit) for item in last]
    assert plain(found) == expected + plain(two[fewer:])
    stages = [item.stage for item in found]
    assert stages == sorted(stages, key=lambda stage: -(stage or 0))


def test_a_result_says_what_the_stage_that_scored_it_did() -> None:
    long, short = "a " * 60, "a"
    first = Reranker("mini", backend="fakes:length", max_length=20)
    with Cascade([first, Reranker("mini", backend="fakes:length")], keep=1) as cascade:
        best, other = cascade.rank("q", [short, long])
        assert (best.index, best.truncated, best.stage) == (1, False, 1)
        assert (other.index, other.stage) == (0, 0)
        assert "stage=1" in repr(best)
        (whole, cut) = cascade.rank("q", [long, long + long])
        assert (whole.truncated, cut.truncated) == (False, True)
        assert best != replace(best, stage=0)


def test_names_awaited_closed_and_pickled() -> None:
    texts = ["Bees make honey.", "Plants make sugar from light.", "Paris is in France."]
    with Cascade(["mini", Reranker("mini", max_length=64)], keep=2) as cascade:
        found = cascade.rank("how do plants make food?", texts)
        assert [item.index for item in found] == [1, 0, 2]
        assert asyncio.run(cascade.arank("how do plants make food?", texts)) == found
        again = pickle.loads(pickle.dumps(cascade))
        assert [each.engine.max_length for each in again.rerankers] == [512, 64]
    with again:
        assert again.rank("how do plants make food?", texts) == found
    assert cascade.rank("q", []) == []


def test_an_instruction_is_for_those_that_take_one(models: list[Reranker]) -> None:
    with pytest.raises(InputError, match="no model of this cascade takes an instruction"):
        Cascade(models[:2]).rank("q", ["d"], instruction="Find it.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rerankers": []}, "rerankers is .*two or more"),
        ({"rerankers": ["mini"]}, "rerankers is .*two or more"),
        ({"rerankers": "mini"}, "rerankers is .*two or more"),
        ({"keep": -1}, "keep is -1; give a whole number, 0 or more"),
        ({"keep": None}, "keep is None; give"),
        ({"keep": [3, 2]}, "keep is .*; give a whole number"),
        ({"keep": 2.5}, "keep is 2.5"),
        ({"error": 0}, "error is 0; give a share of queries"),
        ({"error": 1.0}, "error is 1.0"),
        ({"error": "x"}, "error is 'x'"),
    ],
)
def test_what_a_cascade_is_not_made_of(
    models: list[Reranker], given: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"rerankers": models[:2]}
    with pytest.raises(InputError, match=message):
        Cascade(**{**usual, **given})


def test_three_take_two_numbers_that_do_not_rise(models: list[Reranker]) -> None:
    for keep in (5, [1, 2], [5]):
        with pytest.raises(InputError, match="give 2 whole numbers, 0 or more, none above the one"):
            Cascade(models, keep)
    with pytest.raises(InputError, match="error goes with two rerankers, not with 3"):
        Cascade(models, [2, 1], error=0.1)


# In a TREC run, numbers fall


@given(st.lists(st.lists(st.floats(-50, 50, width=32), max_size=5), max_size=3), st.integers(0, 3))
def test_numbers_of_a_run_fall(stages: list[list[float]], unscored: int) -> None:
    ranking = [
        Ranking(0, 0.5, logit, "", stage=stage)
        for stage, logits in enumerate(stages)
        for logit in sorted(logits, reverse=True)
    ]
    ranking += [Ranking(0, math.nan, math.nan, "", scored=False)] * unscored
    numbers = falling(ranking)
    assert len(numbers) == len(ranking)
    for (a, b), (x, y) in zip(pairwise(ranking), pairwise(numbers), strict=True):
        if a.scored and a.stage == b.stage:
            assert x - y == pytest.approx(a.logit - b.logit, abs=1e-6)
        else:
            assert x - y == pytest.approx(1)
    if ranking and ranking[0].scored:
        assert numbers[0] == ranking[0].logit


# One budget


def test_a_budget_is_for_all_stages_and_leaves_the_last_its_time() -> None:
    texts = ["a " * (n % 30) for n in range(300)]
    small, large = (Reranker("mini", backend=f"fakes:{name}") for name in ("sleepy", "plodding"))
    # 5 ms and 20 ms a pair: 300 and 20 documents would take 1.9 s.
    with Cascade([small, large], keep=20) as cascade:
        took = []
        for _ in range(4):
            begun = time.perf_counter()
            found = cascade.rank("q", texts, budget_ms=1000)
            took.append(time.perf_counter() - begun)
        scored, rescored = found.stage_counts
        assert 40 <= scored < 200
        assert 8 <= rescored <= 20
        assert found.scored_count == scored
        order = [item.index for item in small.rank("q", texts[:scored])]
        assert sorted(item.index for item in found[:rescored]) == sorted(order[:rescored])
        assert [item.stage for item in found] == [1] * rescored + [0] * (scored - rescored) + [
            None
        ] * (300 - scored)
        assert [item.index for item in found[rescored:]] == order[rescored:] + list(
            range(scored, 300)
        )
        assert min(took[1:]) < 1.1
        tiny = cascade.rank("q", texts, budget_ms=0.001)
        assert tiny.stage_counts == (1, 0)


# Early exit


LOGITS = arrays(np.float32, 12, elements=st.floats(-8, 8, width=16))
QUERIES = st.lists(st.tuples(LOGITS.map(lambda x: np.sort(x)[::-1].copy()), LOGITS), min_size=1)


def top(logits: Any, k: int) -> list[int]:
    found: list[int] = np.argsort(-logits, kind="stable")[:k].tolist()
    return found


@settings(max_examples=40)
@given(fit=QUERIES, k=st.integers(1, 5), error=st.floats(0.01, 0.99))
def test_the_margin_is_right_for_as_many_queries_as_it_says(
    fit: list[tuple[Any, Any]], k: int, error: float
) -> None:
    """Of the queries it was fitted on: with n + 1 in place of n, at least 1 - error."""
    exit = EarlyExit.fit(fit, fit, k)
    margin = exit.margin(error)
    right = []
    for before, after in fit:
        stops = [stop for stop in range(1, 12) if exit.settled(before, after[:stop], margin)]
        # Whichever of these it stops at, the top k are the first of full rescoring.
        right.append(all(top(after[:stop], k) == top(after, k) for stop in stops))
        at = exit.rescored(before, after, margin)
        assert at == 12 or at in stops
    assert sum(right) >= math.ceil((1 - error) * (len(fit) + 1)) or margin == math.inf


@settings(max_examples=40)
@given(fit=QUERIES, query=QUERIES, k=st.integers(1, 5))
def test_without_an_error_all_are_rescored(
    fit: list[tuple[Any, Any]], query: list[tuple[Any, Any]], k: int
) -> None:
    exit = EarlyExit.fit(fit, fit, k)
    assert exit.margin(0) == math.inf
    assert all(exit.rescored(*each, exit.margin(0)) == 12 for each in query)


@settings(max_examples=40)
@given(
    fit=QUERIES,
    query=QUERIES,
    k=st.integers(1, 5),
    errors=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_larger_error_never_rescores_more(
    fit: list[tuple[Any, Any]], query: list[tuple[Any, Any]], k: int, errors: tuple[float, float]
) -> None:
    exit = EarlyExit.fit(fit, fit, k)
    less, more = (exit.margin(each) for each in sorted(errors))
    assert less >= more
    for each in query:
        assert exit.rescored(*each, less) >= exit.rescored(*each, more)


def test_few_queries_tell_no_small_error() -> None:
    ramp = np.arange(12, 0, -1).astype(np.float32)
    exit = EarlyExit.fit([(ramp, ramp)], [(ramp, ramp)] * 19, 3)
    assert exit.margins == []  # the first three are the best: no margin is needed
    assert exit.margin(0.05) == -math.inf
    assert exit.margin(0.049) == math.inf
    assert exit.rescored(ramp, ramp, exit.margin(0.05)) == 3
    assert exit.slope == 1
    with pytest.raises(InputError, match="0 and 1 queries"):
        EarlyExit.fit([], [(ramp, ramp)], 3)


# qrank cascade


def invoke(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], input=stdin)


TEXTS = "Bees make honey.\nPlants make sugar from light.\n\nParis is in France.\n"
TWO = ("cascade", "-m", "mini", "-m", "mini", "--backend", "fakes:scrambled")


def test_the_commands_ranking_is_the_cascades() -> None:
    command = (*TWO, "--keep", "2", "-q", "what do bees make?")
    content = json.loads(invoke(*command, "-f", "json", stdin=TEXTS).stdout)
    assert content["models"] == ["mini"] * 2
    assert len(content["targets"]) == 2
    reranker = Reranker("mini", backend="fakes:scrambled")
    with Cascade([reranker, reranker], keep=2) as cascade:
        expected = cascade.rank("what do bees make?", TEXTS.splitlines())
    found = [(item["index"], item["stage"]) for item in content["results"]]
    assert found == [(item.index, item.stage) for item in expected]
    assert [stage for _, stage in found] == [1, 1, 0, 0]
    rows = [line.split("\t") for line in invoke(*command, stdin=TEXTS).stdout.splitlines()]
    assert [(int(row[2]), int(row[3])) for row in rows] == found
    lines = invoke(*command, "-f", "trec", stdin=TEXTS).stdout.splitlines()
    numbers = [float(line.split()[4]) for line in lines]
    assert numbers == sorted(numbers, reverse=True)
    assert "stage" in invoke(*command, "-f", "table", stdin=TEXTS).stdout.splitlines()[0]


def test_a_run_through_a_cascade(tmp_path: Path) -> None:
    Data().write(tmp_path)
    run = [f"q{q} Q0 d{d} {d + 1} {-d} x\n" for q in range(2) for d in range(6)]
    (tmp_path / "run.trec").write_text("".join(run), "utf-8")
    files = ("--queries", tmp_path / "queries.jsonl", "--documents", tmp_path / "documents.jsonl")
    result = invoke(*TWO, "--keep", "3", "--run", tmp_path / "run.trec", *files)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[3] for row in rows] == [str(rank) for rank in range(1, 7)] * 2
    for query in ("q0", "q1"):
        numbers = [float(row[4]) for row in rows if row[0] == query]
        assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "mini"), "two or more, the fastest first"),
        (("-m", "mini", "-m", "mini", "--keep", "x"), "give whole numbers like 20 or 10,20,50"),
        (("-m", "mini", "-m", "mini", "--keep", "3,2"), "give a whole number"),
        (("-m", "mini", "-m", "mini", "--error", "0.1"), "--error goes with --top-k"),
        (("-m", "mini", "-m", "mini", "--error", "0.1", "-k", "3"), "no early exit was fitted"),
    ],
)
def test_a_wrong_cascade_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRANK_DATA", str(tmp_path))
    result = invoke("cascade", *options, "-q", "q", stdin="a\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


# qrank eval SMALL LARGE


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty queries of thirty documents each, and an empty data folder."""
    monkeypatch.setenv("QRANK_DATA", str(tmp_path / "own"))
    documents = {f"d{i}": f"mars {'red ' * i}" for i in range(30)}
    queries = {f"q{i}": f"mars {i}" for i in range(40)}
    Data(documents, queries, [f"q{i} 0 d{(i * 7) % 30} 1" for i in range(40)]).write(tmp_path)
    run = [f"q{q} Q0 d{d} {d + 1} {-d} x\n" for q in range(40) for d in range(30)]
    (tmp_path / "run.trec").write_text("".join(run), "utf-8")
    return tmp_path


def evaluated(collection: Path, small: str, large: str, *more: str) -> Any:
    backends = ("--backend", f"fakes:{small}", "--backend", f"fakes:{large}")
    files: tuple[str | Path, ...] = ("--data", collection, "--run", collection / "run.trec")
    result = invoke("eval", "mini", "mini", *files, *backends, *more, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_composed_cascade_is_the_real_one(models: list[Reranker], collection: Path) -> None:
    content = evaluated(collection, "scrambled", "length", "--keep", "4,30,9", "--top-k", "3")
    rows = {row["name"]: row for row in content["rows"]}
    assert [row["keep"] for row in rows.values()] == [None, None, None, 4, 9, 30]
    first, small, large, *cascades = rows.values()
    assert first["milliseconds"] is None
    assert large["difference"] is None
    assert cascades[-1]["measures"] == large["measures"]
    times = [row["milliseconds"] for row in cascades]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(small["milliseconds"] + large["milliseconds"])
    texts = ["a " * n for n in range(9)]
    small_logits, large_logits = (
        each.score([("q", text) for text in texts], raw=True) for each in models[:2]
    )
    for keep in range(11):
        real = Cascade(models[:2], keep).rank("q", texts)
        assert cascaded(small_logits, large_logits, keep) == [item.index for item in real]


def test_the_early_exit_that_was_fitted_stops(models: list[Reranker], collection: Path) -> None:
    """With a small model that foretells the large one, after the first documents."""
    content = evaluated(collection, "length", "length", "--keep", "30", "--top-k", "3")
    assert (content["fit"], content["held_out"]) == (20, 20)
    exits = {row["error"]: row for row in content["exits"]}
    assert exits[0.02] == {"error": 0.02, "rescored": None, "agreement": None}
    assert exits[0.2] == {"error": 0.2, "rescored": 3.0, "agreement": 1.0}
    texts = ["a " * n for n in range(30)]
    alike = [models[0], models[0]]
    with Cascade(alike, 30, error=0.2) as cascade:
        found = cascade.rank("q", texts, top_k=3)
        assert found.stage_counts == (30, 3)
        assert plain(found) == plain(Cascade(alike, 30).rank("q", texts, top_k=3))
        assert cascade.rank("q", texts, top_k=2, budget_ms=60_000).stage_counts[1] < 30
        for top_k in (None, 4):  # nothing is known of these
            assert cascade.rank("q", texts, top_k=top_k).stage_counts == (30, 30)
        assert pickle.loads(pickle.dumps(cascade)).rank("q", texts, top_k=3) == found
    with pytest.raises(
        InputError, match=r"error is 0\.01, which 15 queries cannot tell: give 0\.063"
    ):
        Cascade(alike, 30, error=0.01)
    with pytest.raises(InputError, match="fitted on the best 30 documents, and keep is 31"):
        Cascade(alike, 31, error=0.2)
    other = Reranker("mini", backend="fakes:length", max_length=99)
    with pytest.raises(InputError, match="no early exit was fitted here for mini"):
        Cascade([other, models[0]], 30, error=0.2)
    Path(content["file"]).write_text("{}", "utf-8")
    with pytest.raises(InputError, match="is damaged"):
        Cascade(alike, 30, error=0.2)


def test_the_measured_agreement_is_that_of_real_cascades(
    models: list[Reranker], collection: Path
) -> None:
    content = evaluated(collection, "length", "scrambled", "--keep", "30", "--top-k", "2")
    assert content["exits"][-1]["error"] == 0.2
    assert 0.5 <= content["exits"][-1]["agreement"] <= 1
    documents = [f"mars {'red ' * i}" for i in range(30)]
    held_out = sorted(np.random.default_rng(0).permutation(40)[20:])
    same = counts = 0
    with Cascade(models[:2], 30, error=0.2) as exit:
        for i in held_out:
            found = exit.rank(f"mars {i}", documents, top_k=2)
            full = Cascade(models[:2], 30).rank(f"mars {i}", documents, top_k=2)
            same += plain(found) == plain(full)
            counts += found.stage_counts[1]
    assert content["exits"][-1]["agreement"] == same / 20
    assert content["exits"][-1]["rescored"] == counts / 20


def test_tables_and_a_plot(collection: Path) -> None:
    plot = collection / "frontier.svg"
    options = ("--data", collection, "--backend", "fakes:length", "--depth", "5")
    result = invoke("eval", "mini", "mini", *options, "--keep", "2", "--plot", plot)
    assert result.exit_code == 0, result.stderr
    *lines, file = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[:5]] == ["run", "BM25", "small", "large", "keep"]
    assert Path(file).is_file()
    assert plot.read_text("utf-8").startswith("<?xml")


def test_the_first_model_may_read_less(collection: Path) -> None:
    options = ("--data", collection, "--backend", "fakes:length", "--first-length", "12")
    result = invoke("eval", "mini", "mini", *options, "--keep", "9", "--json")
    assert result.exit_code == 0, result.stderr
    file = json.loads(result.stdout)["file"]
    command = ("cascade", *TWO[1:5], "--backend", "fakes:length", "--first-length", "12")
    asked = (*command, "--keep", "9", "-q", "mars 1", "-f", "json")
    long = "\n".join("mars " * n for n in range(1, 30))
    found = json.loads(invoke(*asked, stdin=long).stdout)["results"]
    assert [item.get("truncated", False) for item in found[:9]] == [False] * 9
    assert any(item.get("truncated") for item in found[9:])
    assert invoke(*asked, "-k", "3", "--error", "0.2", stdin=long).exit_code == 0
    Path(file).unlink()
    assert "no early exit" in invoke(*asked, "-k", "3", "--error", "0.2", stdin=long).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mini", "mini", "mini"), "give one bundle, or a small and a large one, not 3"),
        (("mini", "--keep", "3"), "--keep, --top-k and --first-length go with two bundles"),
        (("mini", "mini", "--reference", "x"), "--reference and --family go with one bundle"),
    ],
)
def test_a_wrong_evaluation_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = invoke("eval", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
