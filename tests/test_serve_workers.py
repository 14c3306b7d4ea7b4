"""`qrank serve --workers`: processes that share sockets, and the one that watches them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import short_lived
from click.testing import CliRunner
from serving import SECONDS, process
from test_serve import QUERY, TEXTS, body
from test_serve_faults import wait_for
from test_serve_listening import folder  # noqa: F401

from qrank import Reranker
from qrank.cli import main
from qrank.errors import QrankError
from qrank.serve import workers
from qrank.serve.workers import Supervisor, Worker

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")


def children(number: int) -> list[int]:
    """The workers of a server."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text("utf-8").rpartition(")")[2].split()[1]
            command = status.with_name("cmdline").read_text("utf-8")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == str(number) and "spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def runs(number: int) -> bool:
    """Whether a process runs; one that nobody waits for does not."""
    try:
        status = Path(f"/proc/{number}/stat").read_text("utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def samples(url: str) -> dict[str, float]:
    """The values in /metrics, by their names with labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def logged(said: list[str]) -> list[dict[str, Any]]:
    """The lines of the log; all of it must be lines of JSON, or messages of the command's."""
    return [json.loads(line) for line in said if not line.startswith("qrank: ")]


def ask(url: str, texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    """Rerank over a new connection, without the time that httpx takes for one."""
    content = json.dumps(body("/rerank", texts)).encode()
    request = urllib.request.Request(f"{url}/rerank", content, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


Server = tuple[str, subprocess.Popen[str], list[str]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two workers with the bundled model."""
    said: list[str] = []
    arguments = ("--backend", "onnx-int8", "--threads", "2", "--workers", "2")
    with process(*arguments, said=said) as (url, running):
        yield url, running, said


def test_all_workers_give_the_scores_of_one_process(server: Server) -> None:
    url, _, said = server
    with Reranker("mini", backend="onnx-int8", threads=1) as reranker:
        expected = [(each.index, each.score) for each in reranker.rank(QUERY, TEXTS)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: ask(url), range(40)))
    for answer in answers:
        assert [each["index"] for each in answer] == [index for index, _ in expected]
        scores = [each["score"] for each in answer]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-6)
    wait_for(lambda: {line["worker"] for line in logged(said) if "ms" in line} == {1, 2})


def test_metrics_and_the_log_are_of_all_workers(server: Server) -> None:
    url, _, said = server
    counted = (
        'qrank_requests_total{path="/rerank",status="200"}',
        'qrank_request_seconds_count{path="/rerank"}',
        'qrank_pairs_total{model="mini"}',
    )
    before, lines = samples(url), len(said)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: ask(url), range(60)))
    after = samples(url)
    grown = [after[name] - before.get(name, 0) for name in counted]
    assert grown == [60, 60, 60 * len(TEXTS)]
    assert after["qrank_workers"] == 2
    assert after['qrank_model_open{model="mini"}'] == 2
    assert after['qrank_queue_requests{model="mini"}'] == 0
    assert after['qrank_target_info{model="mini",target="onnx-int8@cpu"}'] == 1
    wait_for(lambda: sum(line.get("path") == "/rerank" for line in logged(said[lines:])) == 60)


def test_messages_come_once(server: Server) -> None:
    url, _, said = server
    told = [line for line in said if line.startswith("qrank: ")]
    assert told == ["qrank: mini is onnx-int8@cpu\n", f"qrank: serving at {url}\n"]


def test_a_port_in_use_is_told_as_by_one_process(server: Server) -> None:
    port = server[0].rpartition(":")[2]
    done = CliRunner().invoke(main, ["serve", "--port", port, "--workers", "2"])
    assert done.exit_code == 1
    assert f"cannot listen at --host 127.0.0.1 --port {port}: " in done.stderr


def test_a_worker_that_is_killed_is_replaced(server: Server) -> None:
    """The last of those that share a server."""
    url, running, said = server
    before = samples(url)['qrank_pairs_total{model="mini"}']
    (first, second) = children(running.pid)
    os.kill(first, signal.SIGKILL)
    ask(url)
    wait_for(lambda: samples(url)["qrank_workers"] == 2 and len(children(running.pid)) == 2)
    assert second in children(running.pid)
    assert first not in children(running.pid)
    assert samples(url)['qrank_pairs_total{model="mini"}'] == before + len(TEXTS)
    (line,) = (line for line in logged(said) if line["level"] == "error")
    assert re.fullmatch(
        rf"worker [12] \(process {first}\) was killed by SIGKILL, perhaps .*; another starts",
        line["message"],
    )
    running.send_signal(signal.SIGTERM)
    assert running.wait(SECONDS) == 0


class Client:
    """Sends requests over a connection, one after the other; counts answers and losses."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.answers: list[int] = []
        self.lost = 0
        self.refused = False
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not (self._stop.is_set() or self.refused):
                headers = {"x-request-id": self.name}
                asked = body("/rerank", ["a", "b"])
                try:
                    self.answers.append(
                        client.post("/rerank", json=asked, headers=headers).status_code
                    )
                except httpx.ConnectError:
                    self.refused = True
                except httpx.HTTPError:
                    self.lost += 1

    def end(self) -> None:
        self._stop.set()
        self._thread.join(SECONDS)


@pytest.fixture
def systemd(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[socket.socket]:
    """Receives what is told to systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{folder}/notify")
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/notify")
        yield manager


def test_only_requests_of_a_worker_that_is_killed_fail_and_sigterm_loses_none(
    systemd: socket.socket,
) -> None:
    said: list[str] = []
    arguments = ("--backend", "fakes:plodding", "--workers", "2", "--drain-delay", "0.5")
    with process(*arguments, said=said) as (url, running):
        assert systemd.recv(100) == b"READY=1"
        clients = [Client(url, f"client-{number}") for number in range(8)]
        wait_for(lambda: all(len(client.answers) > 2 for client in clients))
        victim = children(running.pid)[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(children(running.pid)) == 2 and victim not in children(running.pid))
        answered = [len(client.answers) for client in clients]
        wait_for(lambda: samples(url)["qrank_workers"] == 2)
        wait_for(
            lambda: all(
                len(client.answers) > count + 2
                for client, count in zip(clients, answered, strict=True)
            )
        )
        at_kill = next(n for n, line in enumerate(said) if f"process {victim}" in line)
        (number,) = re.findall(r"worker (\d)", said[at_kill])
        served = {line["id"]: line["worker"] for line in logged(said[:at_kill]) if "id" in line}
        for client in clients:
            # A request is lost only on a connection to that worker, and only the one under way.
            assert client.lost <= (served[client.name] == int(number))
        lost = [client.lost for client in clients]

        running.send_signal(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"
        with httpx.Client(base_url=url) as probe:
            wait_for(lambda: probe.get("/ready").status_code == 503)
        ask(url, ["a"])  # a new connection, before the delay is over
        wait_for(lambda: all(client.refused for client in clients))
        for client in clients:
            client.end()
        assert running.wait(SECONDS) == 0
        assert [client.lost for client in clients] == lost
        assert {status for client in clients for status in client.answers} == {200}
        systemd.settimeout(0.1)
        with pytest.raises(TimeoutError):  # the workers tell it nothing
            systemd.recv(100)


def test_workers_end_if_the_supervisor_is_killed(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a Unix socket, and with no cache: the workers get one of their own."""
    monkeypatch.setenv("QRANK_CACHE", "/proc/none")
    said: list[str] = []
    path = folder / "q.sock"
    arguments = ("--backend", "fakes:plodding", "--workers", "2", "--unix-socket", path)
    with (
        process(*arguments, said=said) as (url, running),
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://a") as client,
        ThreadPoolExecutor() as threads,
    ):
        assert url == f"unix:{path}"
        assert sum("no cache" in line for line in said) == 1
        left = children(running.pid)
        assert len(left) == 2
        answer = threads.submit(client.post, "/rerank", json=body("/rerank", ["a"] * 50))
        time.sleep(0.3)  # of the second that it takes
        running.kill()
        assert answer.result().status_code == 200  # what was accepted is answered
        wait_for(lambda: not any(map(runs, left)))
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(path))


def test_a_worker_that_cannot_start_ends_the_server_with_its_message() -> None:
    """And each has its part of the threads and of the memory."""
    command = [str(Path(sys.executable).parent / "qrank"), "serve", "--port", "0"]
    command += ["--backend", "fakes:refusing", "--workers", "2"]
    done = subprocess.run(
        [*command, "--threads", "7", "--max-memory", "2G"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7
    told = r"qrank: error: 3 threads and (\d+) MB are not enough\n"
    found = re.fullmatch(told, done.stderr)
    assert found is not None, done.stderr
    assert 900 < int(found[1]) < 1024


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workers", "4", "--threads", "3"], "each of 4 --workers takes a thread"),
        (["--workers", "0"], "0 is not in the range"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(main, ["serve", "--port", "0", *arguments])
    assert done.exit_code == 2
    assert text in done.stderr


def supervise(work: Callable[[Worker], None], *, until_ready: bool = True) -> list[str]:
    """Run two workers, and stop them when they are ready; what the first one said."""
    heard: list[str] = []

    def ready(said: Any) -> None:
        heard.extend(said)
        if until_ready:
            signal.raise_signal(signal.SIGTERM)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        Supervisor(2, work, [listening], stop_seconds=0.2).run(ready)
    return heard


def test_workers_that_die_at_once_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DEATHS", 3)
    with pytest.raises(QrankError, match=r"worker 1 died 3 times in a row, .* exit code 9"):
        supervise(short_lived.fleeting, until_ready=False)


def test_a_worker_that_is_killed_in_its_start_ends_the_server() -> None:
    with pytest.raises(QrankError, match=r"worker 2 of 2 was killed by SIGKILL.* fewer --workers"):
        supervise(short_lived.stillborn)


def test_a_worker_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MARGIN", 0.3)
    with pytest.raises(QrankError, match=r"the server stopped, but worker [12] .*; worker [12] "):
        supervise(short_lived.stubborn)
