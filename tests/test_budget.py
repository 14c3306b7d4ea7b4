"""Time budgets: kept, used and reported; as properties on a fake clock and in the public API."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import fakes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from qrank import Reranker
from qrank.cli import main
from qrank.errors import InputError
from qrank.scoring.deadline import FIRST, LatencyEstimate, doubling, score_within
from qrank.scoring.inputs import ModelInput

WARM_UP = 8


class Machine:
    """Streams of a given speed, and a clock that only their work advances."""

    def __init__(self, streams: int, seconds_a_token: float, call: float) -> None:
        self.now = 0.0
        self._streams = streams
        self._rate = seconds_a_token
        self._call = call

    def clock(self) -> float:
        return self.now

    def cost(self, tokens: list[int]) -> float:
        ends = [0.0] * self._streams
        for count in sorted(tokens, reverse=True):
            ends[ends.index(min(ends))] += count * self._rate
        return self._call + max(ends)

    def request(
        self, latency: LatencyEstimate, tokens: list[int], budget: float
    ) -> tuple[int, float]:
        """Return the number of documents scored, and the seconds spent."""
        begun, done = self.now, 0
        for some in score_within(budget, steps(tokens), latency, self.clock):
            self.now += self.cost([each.tokens for each in some])
            done += len(some)
        return done, self.now - begun


def steps(tokens: list[int]) -> Iterator[list[ModelInput]]:
    """Yield documents of the given token counts, in steps as `rank` encodes them."""
    nothing, start = np.empty(0, np.int32), 0
    for stop in doubling(len(tokens)):
        yield [
            ModelInput(owner, nothing, np.zeros(tokens[owner], np.int32), None, False, None)
            for owner in range(start, stop)
        ]
        start = stop


@given(
    streams=st.sampled_from([1, 2, 4, 8]),
    rate=st.floats(1e-6, 1e-2),
    call=st.floats(0, 1),
    fits=st.floats(10, 400),
    length=st.integers(8, 500),
)
def test_with_documents_alike_it_is_kept_and_used(
    streams: int, rate: float, call: float, fits: float, length: int
) -> None:
    """With room for ten documents or more, 110 % at most is spent, and 70 % if any are left."""
    machine = Machine(streams, rate, call * rate * length)
    tokens = [length] * 300
    budget = fits * machine.cost(tokens[:1])
    latency = LatencyEstimate()
    for number in range(WARM_UP + 10):
        done, seconds = machine.request(latency, tokens, budget)
        if number >= WARM_UP:
            assert seconds <= budget * 1.1
            assert done == len(tokens) or seconds >= budget * 0.7


@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=200),
    budget=st.floats(0, 10),
    requests=st.integers(1, 4),
)
def test_whatever_comes_documents_are_scored_in_order_and_the_first_always(
    tokens: list[int], budget: float, requests: int
) -> None:
    latency = LatencyEstimate()
    for _ in range(requests):
        clock = itertools.count().__next__
        slices = score_within(budget, steps(tokens), latency, clock)
        scored = [each.owner for some in slices for each in some]
        assert scored == list(range(len(scored)))
        assert 1 <= len(scored) <= len(tokens)


@given(st.integers(1, 3000))
def test_steps_double_and_end_with_the_last_document(total: int) -> None:
    stops = list(doubling(total))
    assert stops[-1] == total
    assert stops[0] == min(FIRST, total)
    assert all(after <= 2 * before for before, after in itertools.pairwise(stops))
    assert stops == sorted(set(stops))


def test_all_parts_of_a_document_are_scored_together() -> None:
    nothing = np.empty(0, np.int32)
    parts = [
        ModelInput(owner, nothing, np.zeros(5, np.int32), None, False, (part, part + 1))
        for owner in range(9)
        for part in range(owner + 1)
    ]
    clock = itertools.count().__next__
    for some in score_within(20, [parts], LatencyEstimate(), clock):
        owners = {each.owner for each in some}
        assert len(some) == sum(owner + 1 for owner in owners)


def test_a_hiccup_is_forgotten() -> None:
    machine = Machine(2, 1e-3, 0.0)
    latency = LatencyEstimate()
    tokens = [100] * 64
    budget = 1.0
    before = [machine.request(latency, tokens, budget)[0] for _ in range(WARM_UP)][-1]
    for size in (1, 2, 4, 8, 16, 32):
        latency.learn(size, size, 1e3)
    after = [machine.request(latency, tokens, budget)[0] for _ in range(200)][-1]
    assert after >= 0.9 * before


# In the public API


def test_rank_keeps_the_rest_in_their_order_and_says_how_many_were_scored(bundle: Path) -> None:
    texts = ["a " * (n % 7) for n in range(100)]
    with Reranker(bundle, backend="fakes:sleepy") as reranker:
        for _ in range(3):
            found = reranker.rank("a", texts, budget_ms=fakes.NAP * 20 * 1000)
        assert 5 <= found.scored_count < 60
        assert [item.scored for item in found] == [True] * found.scored_count + [False] * (
            100 - found.scored_count
        )
        head, tail = found[: found.scored_count], found[found.scored_count :]
        assert sorted(item.index for item in head) == list(range(found.scored_count))
        assert [item.index for item in tail] == list(range(found.scored_count, 100))
        assert all(math.isnan(item.score) and math.isnan(item.logit) for item in tail)
        logits = [item.logit for item in head]
        assert logits == sorted(logits, reverse=True)
        assert [item.text for item in found] == [texts[item.index] for item in found]
        assert reranker.rank("a", texts[:3], budget_ms=1).scored_count >= 1
        everything = reranker.rank("a", texts[:9], budget_ms=60_000)
        assert everything == reranker.rank("a", texts[:9])
        assert everything.scored_count == 9
        assert len(reranker.rank("a", texts, budget_ms=50, top_k=3)) == 3


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf])
def test_budgets_that_are_none(reranker: Reranker, budget: float) -> None:
    with pytest.raises(InputError, match="budget_ms is"):
        reranker.rank("a", ["a"], budget_ms=budget)


@pytest.mark.parametrize("format", ["json", "jsonl", "tsv", "trec", "table"])
def test_the_command_line_says_so_too(bundle: Path, format: str) -> None:
    arguments = ["score", "-m", str(bundle), "--backend", "fakes:sleepy", "-q", "a", "-f", format]
    arguments += ["--budget-ms", str(fakes.NAP * 10 * 1000)]
    result = CliRunner().invoke(main, arguments, input="a\na a\n" * 50)
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    scored = int(line.split()[2])
    assert line == (
        f"qrank: scored {scored} of the 100 documents within the budget; "
        "the others follow in their given order"
    )
    if format == "json":
        content = json.loads(result.stdout)
        assert content["scored_count"] == scored < 100
        flags = [record["score"] is not None for record in content["results"]]
        assert flags == [True] * scored + [False] * (100 - scored)
    if format == "trec":
        numbers = [float(row.split()[4]) for row in result.stdout.splitlines()]
        assert numbers == sorted(numbers, reverse=True)
        assert len(set(numbers[scored - 1 :])) == 101 - scored


def test_a_run_keeps_the_budget_for_every_query(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "q").write_text('{"id": "q1", "text": "a"}\n{"id": "q2", "text": "b"}\n')
    (tmp_path / "d").write_text(
        "".join(f'{{"id": "d{n}", "text": "a"}}\n' for n in range(100)), "utf-8"
    )
    lines = [f"{q} Q0 d{n} {n} {-n} x\n" for q in ("q1", "q2") for n in range(100)]
    (tmp_path / "run").write_text("".join(lines))
    arguments = ["score", "-m", str(bundle), "--backend", "fakes:sleepy", "--budget-ms", "100"]
    for name, file in (("--run", "run"), ("--queries", "q"), ("--documents", "d")):
        arguments += [name, str(tmp_path / file)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert len(rows) == 200
    assert [row[2] for row in rows[:100]] == [f"d{n}" for n in range(100)]
    numbers = [float(row[4]) for row in rows[:100]]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] < numbers[0]
