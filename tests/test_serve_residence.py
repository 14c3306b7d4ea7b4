"""Models that are opened at a request and closed to free memory, and the races between these."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import fakes
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import process

from qrank import Reranker
from qrank.engine import Engine
from qrank.errors import InputError, TargetError
from qrank.serve import in_process
from qrank.serve.app import build
from qrank.serve.request import Limits
from qrank.serve.residence import ServedModel, batch_memory

DOCUMENTS = ["a", "a a a", "a a"]


@dataclass
class Opener:
    """Counts openings of an engine; it can be slow, and can fail."""

    engine: Engine
    seconds: float = 0.0
    errors: list[Exception] = field(default_factory=list)
    count: int = 0

    def __call__(self) -> Engine:
        self.count += 1
        time.sleep(self.seconds)
        if self.errors:
            raise self.errors.pop(0)
        return self.engine


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    """Three engines that count how they are used, in `fakes.strict`."""
    rerankers = [Reranker("mini", backend="fakes:strict_length") for _ in range(3)]
    yield [reranker.engine for reranker in rerankers]
    for reranker in rerankers:
        reranker.close()


@pytest.fixture
def openers(engines: list[Engine]) -> Iterator[list[Opener]]:
    for engine in engines:
        engine.close()
    fakes.strict.clear()
    yield [Opener(engine) for engine in engines]
    assert not {"used when closed", "closed in use", "closed twice"} & {
        event for event, count in fakes.strict.items() if count
    }


@dataclass
class Scene:
    """A running application and its models."""

    app: Any
    models: list[ServedModel]

    async def ask(self, model: str, documents: list[str] = DOCUMENTS) -> tuple[int, str]:
        """Rerank; return the status, and the error or the indices of the documents."""
        asked = {"model": model, "query": "q", "documents": documents}
        found = await in_process.request(self.app, "POST", "/v1/rerank", json.dumps(asked).encode())
        content = json.loads(found[2])
        if found[0] != 200:
            return found[0], content["detail"]
        return found[0], "".join(str(item["index"]) for item in content["results"][:3])

    async def get(self, path: str) -> str:
        return (await in_process.request(self.app, "GET", path, b""))[2].decode()

    @property
    def open(self) -> str:
        """Names of the open models."""
        return "".join(model.name for model in self.models if model.engine is not None)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come to that")


@asynccontextmanager
async def scene(openers: list[Opener], **more: Any) -> AsyncIterator[Scene]:
    """Models a, b, c of 100 bytes each, all closed at first."""
    models = [
        ServedModel(name, opener.engine.manifest, opener, memory=100)
        for name, opener in zip("abc", openers, strict=False)
    ]
    app = build(models, **more)
    async with in_process.started(app):
        yield Scene(app, models)


RIGHT = (200, "120")


def test_two_requests_open_a_model_once(openers: list[Opener]) -> None:
    openers[0].seconds = 0.1

    async def play() -> None:
        async with scene(openers) as it:
            assert json.loads(await it.get("/info"))["models"]["a"]["target"] is None
            assert await asyncio.gather(*(it.ask("a") for _ in range(5))) == [RIGHT] * 5
            assert (openers[0].count, it.open) == (1, "a")
            info = json.loads(await it.get("/info"))["models"]
            assert (info["a"]["open"], info["b"]["open"]) == (True, False)
            assert info["a"]["target"] == "openvino-int8@cpu"

    asyncio.run(play())


@pytest.mark.parametrize("error", [TargetError("no such device"), RuntimeError("a driver's")])
def test_an_error_in_opening_is_a_503_and_the_next_request_tries_again(
    openers: list[Opener], error: Exception
) -> None:
    openers[0].errors, openers[0].seconds = [error], 0.1

    async def play() -> None:
        async with scene(openers) as it:
            refused = await asyncio.gather(it.ask("a"), it.ask("a"), it.ask("b"))
            assert list(refused) == [(503, f"a cannot be opened: {error}")] * 2 + [RIGHT]
            assert "ok" in await it.get("/ready")
            assert await it.ask("a") == RIGHT
            assert openers[0].count == 2

    asyncio.run(play())


def test_an_opening_outlives_the_request_that_began_it(openers: list[Opener]) -> None:
    openers[0].seconds = 0.3

    async def play() -> None:
        async with scene(openers, limits=Limits(seconds=0.1)) as it:
            status, said = await it.ask("a")
            assert (status, said) == (503, "a was not open in time; try again later")
            await it.until(lambda: it.open == "a")
            assert await it.ask("a") == RIGHT
            assert openers[0].count == 1

    asyncio.run(play())


def test_an_idle_model_is_closed_and_its_next_request_opens_it(openers: list[Opener]) -> None:
    async def play() -> None:
        async with scene(openers, idle_seconds=0.2) as it:
            for count in (1, 2):
                assert await it.ask("a") == RIGHT
                assert openers[0].count == count
                began = time.perf_counter()
                await it.until(lambda: not it.open)
                assert time.perf_counter() - began > 0.15
                assert "ok" in await it.get("/ready")
            # Counted when its memory was given back, a moment after its end.
            while 'qrank_model_open{model="a"} 1.0' in (metrics := await it.get("/metrics")):
                await asyncio.sleep(0.01)
            assert 'qrank_model_open{model="a"} 0.0' in metrics
            assert 'qrank_model_openings_total{model="a"} 2.0' in metrics
            assert 'qrank_model_closings_total{model="a",reason="idle"} 2.0' in metrics
            assert re.findall(r"qrank_target_info\{.*\} (.*)", metrics) == ["0.0"]
            assert fakes.strict["closed"] == 2

    asyncio.run(play())


def test_a_model_in_use_is_not_idle() -> None:
    async def play(engine: Engine) -> None:
        async with scene([Opener(engine)], idle_seconds=0.1) as it:
            long = asyncio.create_task(it.ask("a", ["a"] * 30))
            await asyncio.sleep(0.3)
            assert not long.done()
            assert it.open == "a"
            assert (await long)[0] == 200
            await it.until(lambda: not it.open)

    with Reranker("mini", backend="fakes:plodding") as reranker:
        asyncio.run(play(reranker.engine))


def test_nothing_of_a_closed_model_stays_in_memory() -> None:
    opened: list[weakref.ref[Engine]] = []

    def opener() -> Engine:
        engine = Reranker("mini", backend="fakes:length").engine
        opened.append(weakref.ref(engine))
        return engine

    async def play() -> None:
        engine = opener()
        model = ServedModel("a", engine.manifest, opener)
        model.take(engine)
        del engine
        app = build([model], idle_seconds=0.05)
        async with in_process.started(app):
            it = Scene(app, [model])
            for _ in range(2):
                assert await it.ask("a") == RIGHT
                await it.until(lambda: not it.open)
                assert opened[-1]() is None

    asyncio.run(play())
    assert len(opened) == 2


def test_the_least_recently_used_makes_room(openers: list[Opener]) -> None:
    async def play() -> None:
        async with scene(openers, max_memory=250) as it:
            for name, opened in [("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")]:
                assert await it.ask(name) == RIGHT
                assert it.open == opened
            assert [opener.count for opener in openers] == [1, 2, 1]
            metrics = await it.get("/metrics")
            assert 'qrank_model_closings_total{model="b",reason="memory"} 1.0' in metrics

    asyncio.run(play())


def test_a_busy_model_makes_room_when_its_requests_are_done() -> None:
    """Requests that come for it meanwhile do not keep it open: they wait for their turn."""

    async def play(first: Engine, second: Engine) -> None:
        openers = [Opener(first), Opener(second)]
        async with scene(openers, max_memory=150) as it:
            order: list[str] = []

            async def ask(name: str, documents: list[str]) -> None:
                assert (await it.ask(name, documents))[0] == 200
                order.append(name)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ask("a", ["a"] * 15))  # 0.3 s
                await it.until(lambda: it.open == "a")
                tasks.create_task(ask("b", ["a"]))
                await asyncio.sleep(0.05)
                tasks.create_task(ask("a", ["a"]))
            assert order == ["a", "b", "a"]
            assert [opener.count for opener in openers] == [2, 1]

    with (
        Reranker("mini", backend="fakes:plodding") as one,
        Reranker("mini", backend="fakes:plodding") as two,
    ):
        asyncio.run(play(one.engine, two.engine))


def test_any_traffic_stays_within_the_bound_and_is_answered(openers: list[Opener]) -> None:
    chance = random.Random(7)
    for opener in openers:
        opener.seconds = 0.002

    async def play() -> None:
        async with scene(openers, max_memory=220, idle_seconds=0.01) as it:
            most = 0

            async def client() -> None:
                nonlocal most
                for _ in range(12):
                    if chance.random() < 0.2:
                        await asyncio.sleep(chance.random() / 20)
                    asking = asyncio.create_task(it.ask(chance.choice("abc")))
                    if chance.random() < 0.1:
                        await asyncio.sleep(0.001)
                        asking.cancel()
                        await asyncio.wait({asking})
                    else:
                        assert await asking == RIGHT
                    most = max(most, len(it.open))

            await asyncio.gather(*(client() for _ in range(8)))
            assert most == 2
            await it.until(lambda: not it.open)

    asyncio.run(play())
    assert fakes.strict["opened"] == fakes.strict["closed"] > 3


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9), st.integers(1, 10**10))
def test_each_models_share_of_the_bound(sizes: list[int], limit: int) -> None:
    if max(sizes) >= limit:
        with pytest.raises(InputError, match="for all of them"):
            batch_memory(limit, sizes)
        return
    batches = batch_memory(limit, sizes)
    assert max(sizes) + batches <= limit
    assert batches >= (limit - max(sizes)) // 4
    if (limit - sum(sizes)) // len(sizes) >= (limit - max(sizes)) // 4:
        assert sum(sizes) + len(sizes) * batches <= limit


def info(url: str) -> Any:
    return httpx.get(f"{url}/info").json()["models"]


def ask(url: str, model: str) -> int:
    body = {"query": "q", "documents": DOCUMENTS, "model": model}
    return httpx.post(f"{url}/v1/rerank", json=body, timeout=60).status_code


def test_the_command_closes_idle_models() -> None:
    with process("--backend", "fakes:length", "--idle-unload", "0.3") as (url, _):
        for _ in range(2):
            assert ask(url, "mini") == 200
            assert info(url)["mini"]["open"]
            end = time.monotonic() + 20
            while info(url)["mini"]["open"]:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert httpx.get(f"{url}/ready").status_code == 200


def test_the_command_bounds_the_memory_of_several_models() -> None:
    with Reranker("mini") as reranker:
        size = reranker.target.variant.bytes
    said: list[str] = []
    bound = ["--max-memory", str(int(size * 2.3)), "a=mini", "b=mini"]
    with process(*bound, said=said) as (url, _):
        assert "a is opened at its first request" in "".join(said)
        assert [each["open"] for each in info(url).values()] == [False, False]
        for name in "aba":
            assert ask(url, name) == 200
            found = info(url)
            assert [model for model in found if found[model]["open"]] == [name]
            assert found[name]["target"] == "openvino-int8@cpu"
