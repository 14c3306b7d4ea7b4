"""Faults around a server: clients that hang up, are slow or send too much; failing backends."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from serving import process, serving
from test_serve import EVERY, body, message

from qrank import Reranker
from qrank.cli import main
from qrank.serve import server
from qrank.serve.app import build
from qrank.serve.guard import Guard
from qrank.serve.listening import listen
from qrank.serve.request import Limits
from qrank.serve.residence import ServedModel

LIMITS = Limits(body=1_000_000, body_seconds=2.0, queue_tokens=2_000)


@pytest.fixture(scope="module")
def plodding() -> Iterator[str]:
    """A server that takes 20 ms per pair."""
    with (
        Reranker("mini", backend="fakes:plodding", threads=1) as reranker,
        serving({"mini": reranker}, limits=LIMITS) as url,
    ):
        yield url


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def head(length: int | None, path: str = "/v1/rerank") -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [f"POST {path} HTTP/1.1", "host: here", "content-type: application/json", size]
    return "\r\n".join([*lines, "", ""]).encode()


def request(count: int) -> bytes:
    content = httpx.Request("POST", "http://a", json=body("/v1/rerank", ["a"] * count)).content
    return head(len(content)) + content


def everything(client: socket.socket) -> bytes:
    """Everything that the server sends until it closes the connection."""
    found = b""
    while block := client.recv(4096):
        found += block
    return found


def sample(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(x.rpartition(" ")[2] for x in lines if x.startswith(f"{name}{{")))


def lives(url: str) -> None:
    """Check that the server still answers a request."""
    answer = httpx.post(f"{url}/v1/rerank", json=body("/v1/rerank", ["a"]), timeout=60)
    assert answer.status_code == 200, answer.text


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_client_that_hangs_up_asked_for_is_dropped(plodding: str) -> None:
    with connect(plodding) as client:
        client.sendall(request(300))  # 6 s of work
        wait_for(lambda: sample(plodding, "qrank_queue_tokens") > 0)
    wait_for(lambda: sample(plodding, "qrank_queue_tokens") == 0, seconds=4)
    lives(plodding)
    lines = httpx.get(f"{plodding}/metrics").text
    assert 'qrank_dropped_total{model="mini",reason="disconnect"} 1.0' in lines


def test_hanging_up_in_the_middle_of_a_body(plodding: str) -> None:
    for _ in range(5):
        with connect(plodding) as client:
            client.sendall(head(1000) + b'{"query":')
    lives(plodding)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_a_body_of_50_mb_is_refused(plodding: str, path: str, chunked: bool) -> None:
    block = b"x" * 1_000_000
    content: Any = (block for _ in range(50)) if chunked else block * 50
    headers = {"content-type": "application/json"}
    answer = httpx.post(plodding + path, content=content, headers=headers, timeout=60)
    assert answer.status_code == 413
    assert "1,000,000 bytes" in message(path, answer.json())
    assert answer.headers["connection"] == "close"
    lives(plodding)


def test_a_body_that_waits_to_be_told_is_not_sent(plodding: str) -> None:
    with connect(plodding) as client:
        client.sendall(head(50_000_000).replace(b"host:", b"expect: 100-continue\r\nhost:"))
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_many_large_bodies_at_a_time_are_refused(plodding: str) -> None:
    clients = [connect(plodding) for _ in range(12)]
    try:
        for client in clients:
            client.sendall(head(1_000_000) + b" " * 900_000)
        answers = [client.recv(100).split()[1] for client in clients]
    finally:
        for client in clients:
            client.close()
    # The others' bodies never end.
    assert set(answers) == {b"429", b"408"}
    lives(plodding)


def test_a_body_that_dawdles_is_given_up(plodding: str) -> None:
    with connect(plodding) as client:
        client.sendall(head(1000))
        started = time.monotonic()
        for _ in range(5):
            client.sendall(b" ")
            lives(plodding)
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come within 2 s" in answer
    assert time.monotonic() - started < 10


def test_a_head_that_dawdles_is_given_up(plodding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    for beginning in (b"", b"POST /rerank HT"):
        with connect(plodding) as client:
            client.sendall(beginning)
            assert client.recv(100) == b""
    with connect(plodding) as client:
        client.sendall(request(1))
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        client.sendall(b"POST /rer")
        assert b"HTTP/1.1" not in everything(client)
    # The time limit is for the request's head: scoring may take longer.
    answer = httpx.post(f"{plodding}/v1/rerank", json=body("/v1/rerank", ["a"] * 40), timeout=60)
    assert answer.status_code == 200


def test_uvicorn_has_the_private_parts_that_are_built_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the upper bound in pyproject.toml once this and the tests around it pass."""
    seen: list[server.Protocol] = []

    class Seen(server.Protocol):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            seen.append(self)

    async def scene(guard: Guard) -> None:
        made = server.server(guard, ready=lambda: None, drain_seconds=1)
        with listen("127.0.0.1", 0) as listening:
            serving = asyncio.create_task(made.serve(sockets=listening.sockets))
            while not made.started:
                await asyncio.sleep(0.01)
            (url,) = listening.addresses("http")
            async with httpx.AsyncClient() as client:
                await client.get(f"{url}/health")
                (connection,) = made.server_state.connections
                assert connection is seen[0]
                assert connection.cycle.response_complete is True
                assert connection.loop is asyncio.get_running_loop()
                assert not connection.transport.is_closing()
                (listener,) = made.servers
                assert listener.is_serving()
            made.should_exit = True
            await serving
            assert not listener.is_serving()

    monkeypatch.setattr(server, "Protocol", Seen)
    with Reranker("mini", backend="fakes:length") as reranker:
        asyncio.run(scene(build([ServedModel.of("mini", reranker.engine)])))


def test_noise_is_no_request(plodding: str) -> None:
    for noise in (b"\x00\xff\x16\x03\x01" * 100, b"GET /no HTTP/9.9\r\n\r\n", b"\r\n" * 50):
        with connect(plodding) as client:
            client.sendall(noise)
            client.shutdown(socket.SHUT_WR)
            assert b"200 OK" not in client.recv(4096)
    lives(plodding)


@pytest.mark.parametrize("path", EVERY)
def test_a_full_queue(plodding: str, path: str) -> None:
    with connect(plodding) as client:
        client.sendall(request(400))
        wait_for(lambda: sample(plodding, "qrank_queue_tokens") > 1_900)
        answer = httpx.post(plodding + path, json=body(path, ["a " * 200] * 10), timeout=60)
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 600
    assert "limit of 2,000" in message(path, answer.json())


@pytest.mark.parametrize("path", EVERY)
def test_nan_fails_the_request_and_says_so(path: str) -> None:
    with (
        Reranker("mini", backend="fakes:nan_when_long") as reranker,
        serving({"mini": reranker}) as url,
    ):
        answer = httpx.post(url + path, json=body(path, ["mars", "mars " * 50]), timeout=60)
        assert answer.status_code == (424 if path == "/rerank" else 500)
        assert "gave nan for document 1" in message(path, answer.json())
        lives(url)


def test_a_backend_that_raises_on_every_tenth_batch() -> None:
    """Sent one by one, every tenth request fails and says why; sent together, no others fail."""
    with (
        Reranker("mini", backend="fakes:failing") as reranker,
        serving({"mini": reranker}) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):

        def ask(number: int) -> httpx.Response:
            return client.post("/v1/rerank", json=body("/v1/rerank", [f"text {number}"]))

        found = [ask(number) for number in range(40)]
        failed = [answer for answer in found if answer.status_code == 500]
        assert len(failed) == 4
        for answer in failed:
            assert answer.json() == {
                "detail": "the backend failed: RuntimeError: every tenth call fails"
            }
        with ThreadPoolExecutor(16) as threads:
            together = list(threads.map(ask, range(200)))
        assert {answer.status_code for answer in together} <= {200, 500}
        assert sum(answer.status_code == 200 for answer in together) >= 150


def load(url: str, stop: threading.Event, answers: list[int], lost: list[Exception]) -> None:
    """Send requests over one connection until stopped or the server refuses connections."""
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            try:
                answer = client.post("/v1/rerank", json=body("/v1/rerank", ["a", "b"]))
                answers.append(answer.status_code)
            except httpx.ConnectError:
                return
            except httpx.HTTPError as error:
                lost.append(error)


def test_sigterm_under_load_loses_nothing() -> None:
    with process("--backend", "fakes:plodding", "--threads", "1") as (url, server_process):
        answers: list[int] = []
        lost: list[Exception] = []
        stop = threading.Event()
        clients = [threading.Thread(target=load, args=(url, stop, answers, lost)) for _ in range(8)]
        for client in clients:
            client.start()
        with connect(url) as slow, connect(url) as idle:
            slow.sendall(request(60))  # 1.2 s of work, on half of the machine
            wait_for(lambda: len(answers) > 40)
            server_process.send_signal(signal.SIGTERM)
            wait_for(lambda: not all(client.is_alive() for client in clients))
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
            assert idle.recv(100) == b""
        assert server_process.wait(20) == 0
        stop.set()
        for client in clients:
            client.join(20)
    assert lost == []
    assert set(answers) == {200}


def test_a_server_that_drains_says_so() -> None:
    async def scene(guard: Guard) -> httpx.Response:
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            assert (await client.get("/ready")).status_code == 200
            guard.draining = True
            assert (await client.get("/health")).status_code == 200
            return await client.get("/ready")

    with Reranker("mini", backend="fakes:length") as reranker:
        answer = asyncio.run(scene(build([ServedModel.of("mini", reranker.engine)])))
    assert answer.status_code == 503
    assert answer.headers["connection"] == "close"


def test_a_queue_that_fails_ends_the_server() -> None:
    """Waiting requests get an error at once; the server exits, so a supervisor can restart it."""
    with process("--backend", "fakes:queue_breaking", "--threads", "1") as (url, running):
        started = time.monotonic()
        answer = httpx.post(f"{url}/v1/rerank", json=body("/v1/rerank", ["a"] * 200), timeout=60)
        assert answer.status_code == 500
        assert "its log says why" in answer.json()["detail"]
        assert time.monotonic() - started < 30
        assert running.wait(30) == 1


def test_a_server_whose_queue_failed_says_so() -> None:
    async def scene(guard: Guard) -> httpx.Response:
        guard.fail()
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.get("/ready")

    with Reranker("mini", backend="fakes:length") as reranker:
        answer = asyncio.run(scene(build([ServedModel.of("mini", reranker.engine)])))
    assert answer.status_code == 503
    assert answer.json() == {"status": "failed"}


@pytest.mark.parametrize("path", EVERY)
def test_a_budget_scores_one_document_at_least(plodding: str, path: str) -> None:
    asked = {**body(path, ["a", "b", "c"]), "budget_ms": 0.001}
    found = httpx.post(plodding + path, json=asked, timeout=60).json()
    items = found if isinstance(found, list) else found.get("results", found.get("data"))
    assert [item["index"] for item in items] == [0, 1, 2]
    scores = {item.get("score", item.get("relevance_score")) for item in items}
    assert len(scores) == 1
    assert scores != {0.0}
    if path != "/rerank" and not path.startswith("/api"):
        assert [item.get("scored") for item in items] == [None, False, False]


def test_a_budget_is_kept(plodding: str) -> None:
    """40 pairs would take 0.8 s."""
    asked = {**body("/v1/rerank", ["a"] * 40), "budget_ms": 200}
    results = httpx.post(f"{plodding}/v1/rerank", json=asked, timeout=60).json()["results"]
    left = [item for item in results if item.get("scored") is False]
    assert 0 < len(left) < 40
    assert results[-len(left) :] == left
    assert [item["index"] for item in left] == sorted(item["index"] for item in left)
    assert {item["relevance_score"] for item in left} == {results[0]["relevance_score"]}


def resident(number: int) -> int:
    """A process's resident memory, in bytes."""
    status = Path(f"/proc/{number}/status")
    if not status.exists():
        pytest.skip("no /proc here")
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_500_requests_of_random_shapes() -> None:
    """All are answered in order, memory does not grow; benchmarks/serve.py --soak sends 20,000."""
    random = np.random.default_rng(0)
    words = "mars red planet bread wine venus stone light water field".split()

    def ask(client: httpx.Client, number: int) -> None:
        texts = [
            " ".join(random.choice(words, size=int(random.integers(0, 40))))
            for _ in range(int(random.integers(1, 6)))
        ]
        path = EVERY[number % len(EVERY)]
        answer = client.post(path, json=body(path, texts))
        assert answer.status_code == 200, answer.text
        found = answer.json()
        items = found if isinstance(found, list) else found.get("results", found.get("data"))
        assert sorted(item["index"] for item in items) == list(range(len(texts)))

    with (
        process("--backend", "fakes:length") as (url, server_process),
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        list(threads.map(lambda number: ask(client, number), range(200)))
        before = resident(server_process.pid)
        list(threads.map(lambda number: ask(client, number), range(300)))
        assert resident(server_process.pid) < before * 1.1


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    arguments = ("--backend", "fakes:length", "--tls-cert", certificate, "--tls-key", key)
    with process(*arguments) as (url, _):
        assert url.startswith("https://")
        answer = httpx.post(f"{url}/rerank", json=body("/rerank", ["a"]), verify=False, timeout=60)
        assert answer.status_code == 200


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    def serve(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["serve", *arguments])
        assert "Traceback" not in done.output
        return done.exit_code, done.stderr

    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    assert serve("--port", port)[0] == 1
    taken.close()
    (tmp_path / "keys").write_text("", "utf-8")
    key_file = str(tmp_path / "keys")
    for arguments, code, text in [
        (["nano", "--port", "0"], 4, "no model 'nano'"),
        (["mini", "mini", "--port", "0"], 2, "two models are called 'mini'"),
        (["--tls-cert", key_file], 2, "go together"),
        (["--api-key-file", key_file, "--port", "0"], 2, "holds no key"),
    ]:
        found, said = serve(*arguments)
        assert found == code, said
        assert text in said
