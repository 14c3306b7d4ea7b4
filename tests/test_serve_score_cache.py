"""The cache of scores: the same results as without it, and less work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fakes
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving
from test_serve_batching import asked, run

from qrank import Reranker
from qrank.serve.batcher import Batcher
from qrank.serve.metrics import Metrics
from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.score_cache import ScoreCache

WORDS = ["mars", "bread", "venus is a planet", "red " * 600, ""]


@pytest.fixture(scope="module")
def recording() -> Iterator[Reranker]:
    with Reranker("mini", backend="fakes:recording") as opened:
        yield opened


def scored(
    reranker: Reranker, tasks: list[RerankTask], cache: ScoreCache | None
) -> list[RerankOutcome]:
    async def scene() -> list[RerankOutcome]:
        batcher = Batcher("m", reranker.engine, Metrics(), queue_tokens=10**9, cache=cache)
        try:
            return [await batcher.score(task, 30) for task in tasks]
        finally:
            await batcher.close()

    return run(scene())


def plain(outcome: RerankOutcome) -> RerankOutcome:
    """Without what may differ: the work and its time."""
    return replace(outcome, tokens=0, seconds=0.0, cached=None)


tasks = st.builds(
    lambda query, documents, way, most: RerankTask(
        None, [(query, document) for document in documents], None, way, most, None
    ),
    st.sampled_from(WORDS[:2]),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    st.sampled_from(["truncate", "tail", "chunk"]),
    st.sampled_from([None, 3]),
)


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(tasks, min_size=1, max_size=5), size=st.integers(1, 12))
def test_results_are_those_without_it(
    recording: Reranker, requests: list[RerankTask], size: int
) -> None:
    cache = ScoreCache(size)
    found = scored(recording, requests, cache)
    expected = scored(recording, requests, None)
    assert [plain(each) for each in found] == [plain(each) for each in expected]
    assert len(cache) <= size


def test_what_is_known_is_not_scored_again(recording: Reranker) -> None:
    first = asked(3)
    second = replace(first, pairs=[*asked(5).pairs[::-1], ("q", "something else")])
    fakes.recorded.clear()
    found = scored(recording, [first, second, second], ScoreCache(100))
    assert [each.cached for each in found] == [0, 3, 6]
    assert sum(map(len, fakes.recorded)) == 3 + 3
    assert found[2].tokens == 0
    assert found[1].logits == recording.score(second.pairs, raw=True).tolist()


def test_the_least_recently_used_gives_way(recording: Reranker) -> None:
    def one(text: str) -> RerankTask:
        return replace(asked(1), pairs=[("q", text)])

    found = scored(recording, [one(text) for text in "abacabc"], ScoreCache(2))
    assert [each.cached for each in found] == [0, 0, 1, 0, 1, 0, 0]


def test_after_a_budget_the_first_ones_are_scored_and_the_later_known_ones_are_not() -> None:
    """As without a cache, what is scored is a beginning of the documents."""
    with Reranker("mini", backend="fakes:plodding", threads=1) as reranker:
        ends = replace(asked(60), pairs=asked(60).pairs[50:])
        warm, known, late = scored(
            reranker, [asked(20, text="b"), ends, asked(60, budget=0.3)], ScoreCache(1000)
        )
    assert all(warm.scored)
    assert all(known.scored)
    count = sum(late.scored)
    assert 0 < count < 50
    assert late.scored == [True] * count + [False] * (60 - count)
    assert late.order[count:] == list(range(count, 60))
    assert late.cached == 0


def test_targets_do_not_share_scores(recording: Reranker) -> None:
    cache = ScoreCache(100)
    scored(recording, [asked(3)], cache)
    inputs = recording.engine.prepare(asked(3).pairs)
    assert not np.isnan(cache.of(recording.engine).recall(inputs)).any()
    with Reranker("mini", backend=recording.target.variant.name) as other:
        assert other.target.name == recording.target.name
        assert np.isnan(cache.of(other.engine).recall(inputs)).all()


def test_answers_and_metrics_say_what_came_from_it(recording: Reranker) -> None:
    def ask(url: str, **more: Any) -> httpx.Response:
        body = {"query": "q", "documents": ["a", "b", "a"], **more}
        return httpx.post(f"{url}/v1/rerank", json=body, timeout=30)

    with serving({"m": recording}, cached_scores=10) as url:
        first, second = ask(url), ask(url)
        assert [each.headers["x-qrank-cached"] for each in (first, second)] == ["0", "3"]
        assert first.json()["results"] == second.json()["results"]
        lines = httpx.get(f"{url}/metrics").text
        for result in ("hit", "miss"):
            assert f'qrank_score_cache_total{{model="m",result="{result}"}} 3.0' in lines
    with serving({"m": recording}) as url:
        assert "x-qrank-cached" not in ask(url).headers
