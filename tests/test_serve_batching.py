"""The queue: fair slices, budgets, deadlines, back-pressure, and which requests fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import fakes
import numpy as np
import pytest
import tiny_decoders
from hypothesis import given
from hypothesis import strategies as st

from qrank import Reranker
from qrank.bundle.sequences import Logits
from qrank.scoring.inputs import LongDocuments, ModelInput, stops_by_size
from qrank.serve.batcher import Batcher
from qrank.serve.metrics import Metrics
from qrank.serve.request import RequestError, RerankOutcome, RerankTask
from qrank.serve.slices import PREFIXES, Job, Share, next_slice

Result = TypeVar("Result")

NO_LOOP = asyncio.new_event_loop()
NO_LOOP.close()


def job(lengths: list[int], *, prefix: int = 0, deadline: float | None = None) -> Job:
    before = np.zeros(prefix, np.int32)
    inputs = [
        ModelInput(owner, before, np.zeros(length, np.int32), None, truncated=False, part=None)
        for owner, length in enumerate(lengths)
    ]
    return Job(inputs, 0.0, deadline, asyncio.Future(loop=NO_LOOP))


lists = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=20), min_size=1, max_size=6)


@given(lists, st.integers(0, 500), st.integers(1, 4), st.integers(0, 30))
def test_every_input_is_in_a_slice_once_and_slices_are_bounded(
    lengths: list[list[int]], tokens: int, least: int, prefix: int
) -> None:
    jobs = [job(each, prefix=prefix) for each in lengths]
    seen: list[tuple[int, int]] = []
    while shares := next_slice([j for j in jobs if j.waiting], tokens, least, 0.0, 1.0):
        costs = [len(i.ids) for share in shares for i in share.inputs]
        read = sum(costs) + prefix * len(shares)
        assert read == sum(share.tokens for share in shares)
        # More is read only to give every thread an item or to make reading a prefix worthwhile.
        least_share = (PREFIXES + 1) * prefix + max(costs)
        assert read <= max(tokens, least_share) or len(costs) <= least
        for share in shares:
            seen += [(jobs.index(share.job), place) for place in range(share.start, share.stop)]
    assert sorted(seen) == [(j, i) for j, each in enumerate(lengths) for i in range(len(each))]


def test_the_first_job_fills_the_slice_and_the_next_what_is_left() -> None:
    jobs = [job([100] * 3), job([100] * 9)]
    shares = next_slice(jobs, 500, 1, 0.0, 1.0)
    assert [(jobs.index(t.job), t.start, t.stop) for t in shares] == [(0, 0, 3), (1, 0, 2)]
    assert [j.tokens_served for j in jobs] == [300, 200]


def test_a_budget_gets_no_more_than_it_has_time_for() -> None:
    shares = next_slice([job([100] * 9, deadline=2.0), job([100] * 9)], 1000, 1, 1.0, 300.0)
    assert [(t.start, t.stop) for t in shares] == [(0, 3), (0, 7)]


@pytest.fixture(scope="module")
def plodding() -> Iterator[Reranker]:
    with Reranker("mini", backend="fakes:plodding", threads=1) as opened:
        yield opened


def asked(count: int, *, text: str = "a", budget: float | None = None) -> RerankTask:
    pairs = [("q", f"{text} {i}") for i in range(count)]
    return RerankTask(None, pairs, None, "truncate", None, budget)


@asynccontextmanager
async def queue(reranker: Reranker, tokens: int = 100_000) -> AsyncIterator[Batcher]:
    batcher = Batcher("m", reranker.engine, Metrics(), queue_tokens=tokens)
    try:
        yield batcher
    finally:
        await batcher.close()


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


def test_short_requests_do_not_wait_for_a_long_one(plodding: Reranker) -> None:
    """100 pairs take 2 s; 5 short requests, sent afterwards, take a tenth of a second each."""

    async def scene() -> tuple[float, list[float]]:
        async with queue(plodding) as batcher:
            long = asyncio.create_task(batcher.score(asked(100), 30))
            await asyncio.sleep(0.1)
            waits = []
            for _ in range(5):
                outcome = await batcher.score(asked(1), 30)
                waits.append(outcome.seconds)
            assert not long.done()
            return (await long).seconds, waits

    took, waits = run(scene())
    assert max(waits) < took / 3


def test_the_oldest_moves_on_beside_a_stream_of_short_ones(plodding: Reranker) -> None:
    async def scene() -> float:
        async with queue(plodding) as batcher:
            long = asyncio.create_task(batcher.score(asked(30), 30))

            async def stream() -> None:
                while not long.done():
                    await batcher.score(asked(4), 30)

            await asyncio.gather(*(stream() for _ in range(4)))
            outcome = await long
            return outcome.seconds

    # It takes 0.6 s alone, and half of the machine is reserved for it.
    assert run(scene()) < 10 * 0.6


@pytest.mark.parametrize("budget", [None, 30.0])
def test_a_slice_holds_inputs_of_similar_length(
    plodding: Reranker, monkeypatch: pytest.MonkeyPatch, budget: float | None
) -> None:
    """They are padded to the longest of their batch. With a budget, the first documents count."""
    counts = [1 + 7 * i % 10 for i in range(10)]
    pairs = [("q", "a " * count) for count in counts]
    expected = plodding.score(pairs, raw=True)
    slices: list[list[int]] = []
    logits = plodding.engine.logits

    def noted(inputs: Sequence[ModelInput]) -> Logits:
        slices.append([each.owner for each in inputs])
        return logits(inputs)

    monkeypatch.setattr(plodding.engine, "logits", noted)

    async def scene() -> RerankOutcome:
        async with queue(plodding) as batcher:
            return await batcher.score(RerankTask(None, pairs, None, "truncate", None, budget), 30)

    outcome = run(scene())
    order = list(range(10))
    if budget is None:
        order.sort(key=lambda i: -counts[i])
    # Two slices are with the engine at a time: either may begin first.
    slices.sort(key=lambda each: order.index(each[0]))
    assert [owner for each in slices for owner in each] == order
    assert len(slices) > 1
    assert outcome.logits == expected.tolist()


def test_a_request_that_is_alone_gets_longer_slices(
    plodding: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 50 ms, 100 tokens are read, which are 2 documents; alone it is 4, or the last 8."""
    slices: list[int] = []
    logits = plodding.engine.logits

    def noted(inputs: Sequence[ModelInput]) -> Logits:
        slices.append(len(inputs))
        return logits(inputs)

    def measured(batcher: Batcher, tokens: int, started: float) -> float:
        batcher._rate = 2000
        return tokens / 2000

    monkeypatch.setattr(plodding.engine, "logits", noted)
    monkeypatch.setattr(Batcher, "_measure", measured)
    document = "a " * 46  # 50 tokens with the query and three special ones

    async def scene() -> list[list[int]]:
        found = []
        async with queue(plodding) as batcher:
            for requests in ([1], [7], [12], [20, 20]):
                slices.clear()
                tasks = [
                    RerankTask(None, [("q", document)] * count, None, "truncate", None, None)
                    for count in requests
                ]
                await asyncio.gather(*(batcher.score(task, 30) for task in tasks))
                found.append(sorted(slices))
        return found

    first, few, more, two = run(scene())
    assert first == [1]
    assert few == [7]
    assert more == [4, 8]
    # Until the second has come, and once the first is done, the other is alone.
    assert two.count(2) > len(two) / 2
    assert max(two) <= 8


def test_scores_of_mixed_requests_are_those_of_each() -> None:
    async def scene(reranker: Reranker) -> list[RerankOutcome]:
        async with queue(reranker) as batcher:
            words = ["a b c", "d", "e f g h i j"]
            return await asyncio.gather(
                *(batcher.score(asked(n + 1, text=words[n % 3]), 30) for n in range(12))
            )

    fakes.recorded.clear()
    with Reranker("mini", backend="fakes:recording") as recording:
        outcomes = run(scene(recording))
        for number, outcome in enumerate(outcomes):
            pairs = asked(number + 1, text=["a b c", "d", "e f g h i j"][number % 3]).pairs
            expected = recording.score(pairs, raw=True)
            assert outcome.logits == expected.tolist()
            assert all(outcome.scored)
    # 12 requests of 1 to 12 pairs: some calls contained pairs of several requests.
    sizes = [len(work) for work in fakes.recorded[: -len(outcomes)]]
    assert max(sizes) > 12


def test_a_budget_is_kept_and_the_rest_stays_in_order(plodding: Reranker) -> None:
    async def scene() -> RerankOutcome:
        async with queue(plodding) as batcher:
            await batcher.score(asked(20), 30)  # so that the engine's speed is known
            outcome = await batcher.score(asked(100, budget=0.4), 30)
            return outcome

    outcome = run(scene())
    known = sum(outcome.scored)
    assert 0 < known < 75
    assert outcome.seconds < 1.5
    assert outcome.scored == [True] * known + [False] * (100 - known)
    assert outcome.order[known:] == list(range(known, 100))
    assert set(outcome.logits[known:]) == {min(outcome.logits[:known])}


@pytest.mark.parametrize("way", ["truncate", "chunk"])
def test_a_budget_that_is_used_before_its_turn_scores_the_first(way: LongDocuments) -> None:
    """Like `Reranker.rank`: one document is scored, and the others get its score."""

    async def scene(reranker: Reranker) -> RerankOutcome:
        async with queue(reranker) as batcher:
            first = asyncio.create_task(batcher.score(asked(40), 30))
            await asyncio.sleep(0.05)
            short = replace(asked(3, text="a " * 600, budget=1e-6), long_documents=way)
            outcome = await batcher.score(short, 30)
            await first
            return outcome

    with Reranker("mini", backend="fakes:plodding", threads=1) as reranker:
        outcome = run(scene(reranker))
        alone = reranker.score(asked(1, text="a " * 600).pairs, raw=True, long_documents=way)
    assert outcome.scored == [True, False, False]
    assert outcome.order == [0, 1, 2]
    assert outcome.logits == [float(alone[0])] * 3
    assert outcome.tokens > 0


def test_a_budget_ends_the_reading_too() -> None:
    """With a tiny budget, not all of 10 million characters are tokenized."""

    async def scene(reranker: Reranker) -> RerankOutcome:
        async with queue(reranker) as batcher:
            return await batcher.score(
                replace(
                    asked(400, text="mars is red " * 2_000, budget=0.01), long_documents="tail"
                ),
                60,
            )

    with Reranker("mini", backend="fakes:length", threads=1) as reranker:
        started = time.perf_counter()
        reranker.engine.prepare(asked(20, text="mars is red " * 2_000).pairs, None, "tail")
        twentieth = time.perf_counter() - started
        outcome = run(scene(reranker))
    assert outcome.scored[0]
    assert outcome.scored.count(True) < 200
    assert len(outcome.scored) == len(outcome.logits) == 400
    assert outcome.seconds < 10 * twentieth


def test_short_requests_do_not_wait_for_the_reading_of_long_ones() -> None:
    """Four requests of 5 million characters, all of which must be read."""

    async def scene(reranker: Reranker) -> tuple[float, bool]:
        async with queue(reranker, 10**9) as batcher:
            long = [
                asyncio.create_task(
                    batcher.score(
                        replace(asked(50, text=f"mars {n} " * 12_000), long_documents="tail"), 300
                    )
                )
                for n in range(4)
            ]
            await asyncio.sleep(0.3)
            outcome = await batcher.score(asked(1), 60)
            reading = not any(task.done() for task in long)
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)
            assert batcher.queued == 0
            started = time.perf_counter()
            await batcher.score(asked(40, text="mars " * 1_000), 60)
            return max(outcome.seconds, time.perf_counter() - started), reading

    with Reranker("mini", backend="fakes:length", threads=1) as reranker:
        started = time.perf_counter()
        reranker.engine.prepare(asked(2, text="mars " * 12_000).pairs, None, "tail")
        little = time.perf_counter() - started  # for a hundredth of the long requests
        waited, reading = run(scene(reranker))
    # They were still being read; reading stopped once they were cancelled.
    assert reading
    assert waited < 20 * little


def test_steps_are_what_is_prepared_at_once() -> None:
    with Reranker("mini", backend="fakes:length") as reranker:
        pairs = [(f"q {n % 3}", "mars is red " * (n * 37 % 90)) for n in range(60)]
        for way in get_args(LongDocuments):
            whole = reranker.engine.prepare(pairs, None, way)
            stops = stops_by_size([len(document) for _, document in pairs], 2_000)
            steps = list(reranker.engine.preparing(pairs, stops, None, way))
            assert len(steps) > 5
            found = [item for step in steps for item in step]
            assert [item.owner for item in found] == [item.owner for item in whole]
            assert [item.ids.tolist() for item in found] == [item.ids.tolist() for item in whole]
    assert len({id(item.prefix) for item in found}) <= len(steps) * 3


def test_a_queue_that_fails_tells_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    def broken(*arguments: object) -> list[Share]:
        raise ZeroDivisionError("a bug")

    async def scene(reranker: Reranker) -> None:
        batcher = Batcher(
            "m", reranker.engine, Metrics(), queue_tokens=10**6, failed=lambda: ended.append(True)
        )
        waiting = [asyncio.create_task(batcher.score(asked(50), 30)) for _ in range(3)]
        await asyncio.sleep(0.1)
        monkeypatch.setattr("qrank.serve.batcher.next_slice", broken)
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in found] == [RequestError] * 3
        assert {error.status for error in found if isinstance(error, RequestError)} == {500}
        with pytest.raises(RequestError, match="the queue of m has failed") as refused:
            await batcher.score(asked(1), 30)
        assert refused.value.status == 503
        assert batcher.queued == 0
        await batcher.close()

    with Reranker("mini", backend="fakes:plodding", threads=1) as reranker:
        run(scene(reranker))
    assert ended == [True]


def test_what_takes_too_long_is_given_up(plodding: Reranker) -> None:
    async def scene() -> None:
        async with queue(plodding) as batcher:
            start = time.perf_counter()
            with pytest.raises(RequestError, match=r"not scored within 0\.2 s") as refused:
                await batcher.score(asked(100), 0.2)
            assert refused.value.status == 503
            assert time.perf_counter() - start < 1.8
            # Its items are dropped with it: the next request is served at once.
            outcome = await batcher.score(asked(1), 30)
            assert outcome.seconds < 1.5
            assert batcher.queued == 0

    run(scene())


def test_a_full_queue_refuses_and_says_when(plodding: Reranker) -> None:
    async def scene() -> None:
        async with queue(plodding, tokens=200) as batcher:
            # Above the limit, but accepted because the queue is empty.
            long = asyncio.create_task(batcher.score(asked(50), 30))
            await asyncio.sleep(0.2)
            with pytest.raises(RequestError, match="beyond its limit of 200") as refused:
                await batcher.score(asked(1), 30)
            assert refused.value.status == 429
            assert 1 <= (refused.value.retry_after or 0) <= 600
            await long
            await batcher.score(asked(1), 30)

    run(scene())


def test_a_cancelled_request_leaves_the_queue(plodding: Reranker) -> None:
    async def scene() -> None:
        async with queue(plodding) as batcher:
            gone = asyncio.create_task(batcher.score(asked(200), 30))
            await asyncio.sleep(0.1)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            assert batcher.queued == 0
            outcome = await batcher.score(asked(1), 30)
            assert outcome.seconds < 2  # instead of the 4 s that it would have taken

    run(scene())


def test_one_bad_document_fails_its_own_request_alone() -> None:
    """NaN for pairs of more than 40 tokens, in a call with pairs of several requests."""

    async def scene(reranker: Reranker) -> list[RerankOutcome | BaseException]:
        async with queue(reranker) as batcher:
            requests = [asked(3), asked(1, text="long " * 50), asked(2)]
            return await asyncio.gather(
                *(batcher.score(each, 30) for each in requests), return_exceptions=True
            )

    with Reranker("mini", backend="fakes:nan_when_long") as reranker:
        first, bad, last = run(scene(reranker))
    assert isinstance(first, RerankOutcome)
    assert isinstance(last, RerankOutcome)
    assert isinstance(bad, RequestError)
    assert bad.status == 500
    assert "gave nan for document 0" in bad.message


@pytest.mark.parametrize("kind", ["qwen3", "zerank"])
def test_decoders_in_slices_score_as_they_do_at_once(
    checkpoint_of: Callable[[str], Path], kind: str
) -> None:
    """With prefixes of several requests, each read again in every slice."""

    async def scene(reranker: Reranker) -> list[RerankOutcome]:
        async with queue(reranker) as batcher:
            return await asyncio.gather(
                *(batcher.score(replace(asked(9), pairs=each), 60) for each in requests)
            )

    texts = ["mars is red " * (n % 5 + 1) for n in range(9)]
    requests = [[(query, text) for text in texts] for query in ("which planet?", "bread")]
    family = tiny_decoders.FAMILIES[kind]
    with Reranker(checkpoint_of(kind), backend="torch", family=family) as reranker:
        for outcome, pairs in zip(run(scene(reranker)), requests, strict=True):
            expected = reranker.score(pairs, raw=True)
            assert outcome.logits == pytest.approx(expected.tolist(), abs=1e-4)
        (head,) = reranker.engine.prepare([("q", "one two " * 5000)], None, "truncate", 8)
        (tail,) = reranker.engine.prepare([("q", "one two " * 5000)], None, "tail", 8)
        whole = reranker.engine.prepare([("q", "one")])[0]
    # The prompt's text before and after the document stays around the document's tail.
    assert len(head.ids) == len(tail.ids)
    assert head.truncated
    assert tail.truncated
    assert head.ids[0] == tail.ids[0] == whole.ids[0]
    assert head.ids[-1] == tail.ids[-1] == whole.ids[-1]
