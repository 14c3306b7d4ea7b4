"""`qrank serve` under load: throughput against the engine's, short requests during long ones.

Clients are threads of this process, over loopback; each sends BM25's best documents for one query
after the other. All systems take turns: qrank, with several `--workers` a server for each number,
and with their Pythons sentence-transformers behind a minimal FastAPI app and infinity, on the same
checkpoint. With `--soak N` instead, it sends N requests of random shapes, and shows the server's
memory after each tenth of them.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from common import alternate, arguments, report

from qrank import Reranker
from qrank.bundle.locate import DEFAULT
from qrank.quality.collection import Collection
from qrank.system.machine import processors

Task = tuple[str, list[str]]
HERE = Path(__file__).parent
ENGINE = "the engine, called directly"
OURS = "qrank serve"
PEER = "sentence-transformers, plain FastAPI"
INFINITY = "infinity"
THROUGHPUT = {
    "system": "",
    "clients": "d",
    "pairs/s": ",.1f",
    "of the engine": ".0%",
    "p50 ms": ",.0f",
    "p99 ms": ",.0f",
}
TURNS = {"system": "", "p50 ms": ",.0f", "p95 ms": ",.0f", "more than the engine": ".1%"}
LATENCY = {"system": "", "short requests": "", "p50 ms": ",.0f", "p99 ms": ",.0f", "n": "d"}
MEMORY = {"requests": ",d", "MB": ",.1f", "requests/s": ",.1f"}


def main() -> None:
    """Start the servers, and measure."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT, help="bundle  [default: %(default)s]")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--queries", type=int, default=32, help="requests of a round")
    parser.add_argument("--documents", type=int, nargs="+", default=[20], help="of a request")
    parser.add_argument("--long", type=int, default=400, help="documents of a long one; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--backend", help="of the server  [default: the preferred variant]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="of a server each")
    parser.add_argument("--soak", type=int, metavar="N", help="requests of random shapes")
    parser.add_argument("--peer-python", help="with sentence-transformers, fastapi and uvicorn")
    parser.add_argument("--infinity-python", help="with infinity-emb[torch,server]")
    parser.add_argument("--peer-model", default="models/mini", help="the peers' checkpoint")
    options = parser.parse_args()
    serve = [str(Path(sys.executable).parent / "qrank"), "serve", options.model]
    serve += ["--threads", str(options.threads), "--queue-tokens", "100000000"]
    serve += ["--backend", options.backend] if options.backend else []
    if options.soak:
        with server(serve) as (port, process):
            rows = soak(port, process.pid, options.soak)
        title = f"{options.soak:,} requests of random shapes to {options.model}"
        report(title, MEMORY, rows, as_json=options.json)
        return
    if options.data is None:
        parser.error("--data FOLDER is needed")
    collection = Collection.read(options.data)
    found = collection.bm25(max(*options.documents, 200))
    candidates = [
        (collection.queries[query], [collection.documents[d] for d in found[query]])
        for query in list(collection.queries)[: options.queries]
    ]
    with ExitStack() as stack:
        ports = {}
        for count in options.workers:
            name = OURS if count == 1 else f"{OURS} --workers {count}"
            command = [*serve, "--workers", str(count)]
            ports[name] = stack.enter_context(server(command))[0]
        if options.peer_python:
            peer = [options.peer_python, str(HERE / "plain_app.py"), options.peer_model]
            ports[PEER] = stack.enter_context(server(peer))[0]
        if options.infinity_python:
            command = str(Path(options.infinity_python).with_name("infinity_emb"))
            peer = [command, "v2", "--model-id", options.peer_model, "--engine", "torch"]
            peer += ["--device", "cpu", "--dtype", "float32", "--url-prefix", "/v1"]
            ports[INFINITY] = stack.enter_context(server(peer))[0]
        engine = stack.enter_context(
            Reranker(options.model, backend=options.backend, threads=options.threads)
        )
        for count in options.documents:
            tasks = [(query, documents[:count]) for query, documents in candidates]
            rows = throughput(engine, ports, tasks, options.clients, options.rounds)
            title = f"{options.model}: {count} documents a request, {options.threads} threads"
            report(title, THROUGHPUT, rows, as_json=options.json)
            if one := ports.get(OURS):
                rows = in_turns(engine, one, tasks)
                report(f"{title}, in turns", TURNS, rows, as_json=options.json)
        if not options.long:
            return
        query, best = candidates[0]
        long = (query, [best[place % len(best)] for place in range(options.long)])
        rows = [
            {"system": name, "short requests": what, **figures}
            for name, port in ports.items()
            for what, figures in beside(port, [(q, d[:5]) for q, d in tasks], long).items()
        ]
        title = f"{options.model}: 5 documents a request, beside requests of {len(long[1])}"
        report(title, LATENCY, rows, as_json=options.json)


def throughput(
    engine: Reranker,
    ports: dict[str, int],
    tasks: Sequence[Task],
    clients: Sequence[int],
    rounds: int,
) -> list[dict[str, object]]:
    """Measure every system with every number of clients, and the engine called directly.

    A request's time includes its wait for those of the other clients.
    """
    latencies: dict[tuple[str, int], list[float]] = {}

    def run(system: str, count: int) -> None:
        if system == ENGINE:
            found = [ranked(engine, task) for task in tasks]
        else:
            found = load(ports[system], tasks, count)
        latencies.setdefault((system, count), []).extend(found)

    keys = [(ENGINE, 1), *((system, count) for system in ports for count in clients)]
    cases: dict[tuple[str, int], Callable[[], object]] = {key: partial(run, *key) for key in keys}
    seconds = {case: statistics.median(s) for case, s in alternate(cases, rounds).items()}
    pairs = sum(len(documents) for _, documents in tasks)
    rows = []
    for (system, count), taken in seconds.items():
        # Without the round that warmed up.
        p50, p99 = np.percentile(latencies[system, count][len(tasks) :], [50, 99]) * 1000
        rows.append(
            {
                "system": system,
                "clients": count,
                "pairs/s": pairs / taken,
                "of the engine": seconds[ENGINE, 1] / taken,
                "p50 ms": float(p50),
                "p99 ms": float(p99),
            }
        )
    return rows


def ranked(engine: Reranker, task: Task) -> float:
    """Seconds of the engine for a task."""
    began = time.perf_counter()
    engine.rank(*task)
    return time.perf_counter() - began


def in_turns(engine: Reranker, port: int, tasks: Sequence[Task]) -> list[dict[str, object]]:
    """Each task, after one that warms up, to the engine and over HTTP from one client."""
    taken = np.array([[ranked(engine, t), load(port, [t], 1)[0]] for t in [tasks[0], *tasks]])[1:]
    more = float(np.median(taken[:, 1] / taken[:, 0])) - 1
    return [
        {
            "system": name,
            "p50 ms": float(np.percentile(seconds, 50)) * 1000,
            "p95 ms": float(np.percentile(seconds, 95)) * 1000,
            "more than the engine": extra,
        }
        for name, seconds, extra in ((ENGINE, taken[:, 0], 0.0), (OURS, taken[:, 1], more))
    ]


def beside(port: int, tasks: Sequence[Task], long: Task) -> dict[str, dict[str, float | int]]:
    """Latency of short requests in sequence: alone, and during long ones of two other clients."""
    alone = [seconds for _ in range(3) for seconds in load(port, tasks, 1)]
    over = threading.Event()

    def press() -> None:
        while not over.is_set():
            load(port, [long], 1)

    presses = [threading.Thread(target=press) for _ in range(2)]
    for thread in presses:
        thread.start()
    time.sleep(0.5)
    pressed = [seconds for _ in range(3) for seconds in load(port, tasks, 1)]
    over.set()
    for thread in presses:
        thread.join()

    def figures(seconds: list[float]) -> dict[str, float | int]:
        p50, p99 = np.percentile(seconds, [50, 99]) * 1000
        return {"p50 ms": float(p50), "p99 ms": float(p99), "n": len(seconds)}

    return {"alone": figures(alone), "beside long ones": figures(pressed)}


def soak(port: int, process: int, count: int) -> list[dict[str, object]]:
    """Send requests of random shapes from eight clients; the server's memory after each tenth.

    The largest requests come first, as a warm-up: later growth is then not a new high-water mark.
    """
    random = np.random.default_rng(0)
    words = "mars red planet bread wine venus stone light water field".split()

    def task() -> Task:
        # Few are long, as in practice.
        lengths = np.minimum(random.geometric(0.03, min(int(random.geometric(0.2)), 40)), 400)
        return "which planet is red?", [" ".join(random.choice(words, n)) for n in lengths]

    def resident() -> float:
        status = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
        return int(next(x for x in status if x.startswith("VmRSS")).split()[1]) * 1024 / 1e6

    load(port, [("which planet is red?", [" ".join(random.choice(words, 400))] * 40)] * 8, 8)
    rows: list[dict[str, object]] = [{"requests": 0, "MB": resident()}]
    step = max(count // 10, 1)
    for start in range(0, count, step):
        tasks = [task() for _ in range(min(step, count - start))]
        began = time.perf_counter()
        load(port, tasks, 8)
        rows.append(
            {
                "requests": start + len(tasks),
                "MB": resident(),
                "requests/s": len(tasks) / (time.perf_counter() - began),
            }
        )
    return rows


def load(port: int, tasks: Sequence[Task], clients: int) -> list[float]:
    """Send every task once, from a number of clients; return the seconds of each.

    Raises:
        RuntimeError: an answer is not 200.
    """
    waiting: Iterator[Task] = iter(tasks)
    lock, seconds, wrong = threading.Lock(), [], []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"content-type": "application/json"}
        while True:
            with lock:
                task = next(waiting, None)
            if task is None:
                break
            body = json.dumps({"query": task[0], "documents": task[1]})
            began = time.perf_counter()
            connection.request("POST", "/v1/rerank", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            seconds.append(time.perf_counter() - began)
            if answer.status != 200:
                wrong.append(content)
                break
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong or len(seconds) != len(tasks):
        raise RuntimeError(f"{len(seconds)} of {len(tasks)} answered; {wrong[:1]}")
    return seconds


@contextmanager
def server(command: list[str]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server; yields its port and its process once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                # qrank serve listens before its model is loaded.
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("GET", "/health")
                connection.getresponse().read()
                connection.close()
                break
            except ConnectionError:
                time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
