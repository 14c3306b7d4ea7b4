"""Reciprocal rank fusion: its laws, and several runs as one first stage."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from judged import Data, opened

from qrank.cli import main
from qrank.quality.fusion import FusedRun, K, fuse

ORDERS = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=4)


@given(ORDERS)
def test_scores_are_sums_of_reciprocal_ranks_and_fall(orders: list[list[str]]) -> None:
    found = fuse(orders)
    assert set(found) == {document for order in orders for document in order}
    for document, score in found.items():
        ranks = [order.index(document) + 1 for order in orders if document in order]
        assert score == pytest.approx(sum(1 / (K + rank) for rank in ranks))
    assert list(found.values()) == sorted(found.values(), reverse=True)


@given(ORDERS, st.randoms())
def test_the_order_of_runs_only_breaks_ties(orders: list[list[str]], chance: object) -> None:
    mixed = list(orders)
    chance.shuffle(mixed)  # type: ignore[attr-defined]
    assert fuse(mixed) == fuse(orders)


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.integers(1, 4))
def test_runs_that_agree_are_kept(order: list[str], times: int) -> None:
    assert list(fuse([order] * times)) == order


@given(ORDERS, st.sampled_from("abcdefgh"))
def test_one_more_run_that_has_it_never_hurts(orders: list[list[str]], document: str) -> None:
    before, after = fuse(orders), fuse([*orders, [document]])
    place = list(after).index(document)
    assert place <= (list(before).index(document) if document in before else len(before))


LINES = {
    "a": ["q1 Q0 d1 1 3 a", "q1 Q0 d2 2 2 a", "q1 Q0 d3 3 1 a", "q2 Q0 d1 1 1 a"],
    # By score, d3 comes first; q3 is only here; q1 comes twice.
    "b": ["q1 Q0 d2 1 1 b", "q3 Q0 d2 1 1 b", "q1 Q0 d3 2 5 b"],
}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for name, lines in LINES.items():
        (tmp_path / f"{name}.trec").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return [tmp_path / f"{name}.trec" for name in LINES]


def test_runs_are_fused_query_by_query(runs: list[Path]) -> None:
    fused = FusedRun(runs)
    found = [(line.query, line.document) for line in fused]
    assert found == [("q1", d) for d in ("d3", "d2", "d1")] + [("q2", "d1"), ("q3", "d2")]
    score = float(next(iter(fused)).score)
    assert math.isclose(score, 1 / (K + 3) + 1 / (K + 1))
    assert [line.where for line in fused][-1] == f"{runs[1]}, line 2"
    fused.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 d2 1 9 b", "line 4: document 'd2' stands there twice for query 'q1'"),
        ("q1 Q0 d9 1 high b", "line 4: the score 'high' is no finite number"),
        ("q1 Q0 d9 1", "line 4: expected 6 columns"),
        ("q1 Q0 d9 1 1 b", "line 4: the documents file lacks 'd9'"),
        ("q9 Q0 d1 1 1 b", "line 4: the queries file lacks query 'q9'"),
    ],
)
def test_a_bad_line_is_named(runs: list[Path], line: str, message: str) -> None:
    with runs[1].open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    result = score(runs)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{runs[1]}, {message}" in result.stderr


def score(runs: list[Path], *more: str) -> Result:
    folder = runs[0].parent
    for name, texts in (("q", ["q1", "q2", "q3"]), ("d", ["d1", "d2", "d3"])):
        lines = [json.dumps({"id": each, "text": "a " * int(each[1])}) + "\n" for each in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    options = [x for run in runs for x in ("--run", str(run))] + ["--rrf"]
    texts_ = ["--queries", str(folder / "q.jsonl"), "--documents", str(folder / "d.jsonl")]
    command = ["score", "-m", "mini", *options, *texts_, *more]
    return CliRunner().invoke(main, command)


def test_score_reranks_the_fused_run(runs: list[Path]) -> None:
    result = score(runs, "--backend", "fakes:ties")  # which keep the fused order
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    expected = ["q1 d3", "q1 d2", "q1 d1", "q2 d1", "q3 d2"]
    assert [f"{row[0]} {row[2]}" for row in rows] == expected
    out = runs[0].parent / "out"
    into = score(runs, "--backend", "fakes:ties", "-o", str(out))
    assert into.exit_code == 0, into.stderr
    assert (out / "rrf.trec").read_text("utf-8") == result.stdout


def test_eval_takes_the_fused_run(tmp_path: Path) -> None:
    Data().write(tmp_path)
    for name, order in (("a", (1, 0, 2)), ("b", (0, 3, 1))):
        lines = [f"q0 Q0 d{d} {r} {-r} x\n" for r, d in enumerate(order)]
        (tmp_path / name).write_text("".join(lines), "utf-8")
    with opened(tmp_path) as collection:
        fused = collection.run(tmp_path / "a", tmp_path / "b", depth=3)
    assert list(fused["q0"]) == ["d0", "d1", "d3"]
    options = ["--data", str(tmp_path), "--backend", "fakes:ties", "--depth", "3"]
    options += ["--run", str(tmp_path / "a"), "--run", str(tmp_path / "b")]
    result = CliRunner().invoke(main, ["eval", "mini", *options, "--rrf", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"][0]["measures"]["MRR@10"] == 1
    refused = CliRunner().invoke(main, ["eval", "mini", *options])
    assert "2 times --run: --rrf fuses them" in refused.stderr


@pytest.mark.parametrize("command", ["score", "cascade", "eval", "calibrate"])
def test_rrf_takes_several_runs(command: str, runs: list[Path], tmp_path: Path) -> None:
    Data().write(tmp_path)
    where = {
        "score": [],
        "cascade": ["-m", "mini", "-m", "mini"],
        "eval": ["mini", "--data", str(tmp_path)],
        "calibrate": ["mini", "--data", str(tmp_path)],
    }
    result = CliRunner().invoke(main, [command, *where[command], "--rrf", "--run", str(runs[0])])
    assert result.exit_code == 2
    assert "--rrf goes with two --run or more" in result.stderr
