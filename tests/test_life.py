"""Lifecycle of a reranker: closed, dropped, shared by threads or forked, with the same scores."""

import gc
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fakes
import numpy as np
import pytest
from conftest import subset

from qrank import Reranker
from qrank.backends import BACKENDS

QUERY = "which planet is red?"


def words(*counts: int) -> list[str]:
    """Documents with the given numbers of one-letter words."""
    return [" ".join("a" * count) for count in counts]


def test_closing_frees_and_using_again_loads_again(bundle: Path) -> None:
    fakes.closed.clear()
    reranker = Reranker(bundle, backend="fakes:length")
    before = reranker.score([("q", "d")])
    reranker.close()
    reranker.close()
    assert fakes.closed == ["fake"]
    assert reranker.score([("q", "d")]) == before
    with reranker as same:
        assert same is reranker
    assert fakes.closed == ["fake", "fake"]


def test_closing_the_real_one(bundle: Path) -> None:
    with Reranker(bundle) as reranker:
        before = reranker.score([(QUERY, "mars")] * 20)
    gc.collect()
    np.testing.assert_array_equal(reranker.score([(QUERY, "mars")] * 20), before)
    reranker.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_at_once(bundle: Path, threads: int) -> None:
    pairs = [(QUERY, text) for text in words(*range(20), 5, 100)]
    with Reranker(bundle, threads=threads) as reranker:
        alone = reranker.score(pairs, raw=True)
        with ThreadPoolExecutor(4) as pool:
            for together in pool.map(lambda _: reranker.score(pairs, raw=True), range(8)):
                np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_crowd_with_a_pair_each_shares_what_is_idle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A llama.cpp call takes all idle contexts, so several calls compete for the last one."""
    interval = sys.getswitchinterval()
    with Reranker(bundle, backend="gguf-f16", threads=3) as reranker:
        expected = reranker.score([(QUERY, "a")], raw=True)
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as pool:
                calls = [pool.submit(reranker.score, [(QUERY, "a")], raw=True) for _ in range(1500)]
                for call in calls:
                    assert abs(call.result() - expected).max() < 1e-4
        finally:
            sys.setswitchinterval(interval)


def used_and_closed(reranker: Reranker, calls: int, pause: float) -> None:
    """Make `calls` calls in total on two threads, and meanwhile close it at random moments."""
    chance = random.Random(7)
    pairs = [(QUERY, text) for text in words(1, 5)]
    expected = reranker.score(pairs, raw=True)
    done = threading.Event()

    def score() -> None:
        for _ in range(calls // 2):
            assert abs(reranker.score(pairs, raw=True) - expected).max() < 1e-4

    def close() -> None:
        while not done.wait(chance.uniform(0, pause)):
            reranker.close()

    with ThreadPoolExecutor(3) as pool:
        closing = pool.submit(close)
        scoring = [pool.submit(score) for _ in range(2)]
        try:
            for future in scoring:
                future.result(300)
        finally:
            done.set()
        closing.result(60)
    reranker.close()


def test_closed_at_random_moments_ten_thousand_calls_are_answered(bundle: Path) -> None:
    fakes.strict.clear()
    used_and_closed(Reranker(bundle, backend="fakes:strict_length"), 10_000, pause=0.2)
    opened = fakes.strict["opened"]
    assert opened > 5
    assert +fakes.strict == {"opened": opened, "closed": opened}


@pytest.mark.parametrize(
    ("backend", "calls"),
    [("onnx-int8", 400), ("openvino-int8", 12), ("gguf-f16", 400), ("mlx-int8", 100)],
)
def test_a_real_model_is_closed_after_its_last_call(bundle: Path, backend: str, calls: int) -> None:
    used_and_closed(Reranker(bundle, backend=backend, threads=2), calls, pause=0.2)


def test_one_that_is_closed_in_use_is_freed_by_its_last_call(bundle: Path) -> None:
    fakes.closed.clear()
    reranker = Reranker(bundle, backend="fakes:sleepy")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(reranker.score, [(QUERY, "a")] * count) for count in (10, 40)]
        time.sleep(10 * fakes.NAP / 2)
        reranker.close()
        assert fakes.closed == []
        calls[0].result(60)
        assert fakes.closed == []
        calls[1].result(60)
    assert fakes.closed == ["fake"]


DROP = """
import ctypes, sys
from qrank import Reranker

def resident():
    # What was freed goes back to the system, and not to the heap for its next use.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

documents = ["mars is red " * count for count in (1, 5, 40)]
for _ in range(20):
    Reranker(sys.argv[1], backend=sys.argv[2], threads=2).rank("which planet is red?", documents)
    print(resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is told in other ways here")
@pytest.mark.parametrize("backend", ["onnx-int8", "openvino-int8", "gguf-f16", "mlx-int8"])
def test_one_that_is_dropped_frees_its_model(bundle: Path, backend: str) -> None:
    """After opening 20 without closing any, memory is at most 10 % above that of three.

    What the heap keeps differs by some megabytes from one opening to the next: one that stayed is
    in the least of the last ones too.
    """
    done = subprocess.run(
        [sys.executable, "-c", DROP, str(bundle), backend],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    resident = [int(line) for line in done.stdout.splitlines()]
    assert min(resident[-5:]) < 1.1 * max(resident[:3]), resident


FORK = """
import gc, json, os, sys, threading, time
from qrank import Reranker

folder, backend, threads, at_work = *sys.argv[1:3], int(sys.argv[3]) or None, int(sys.argv[4])
pairs = [("which planet is red?", "mars is red " * n) for n in range(12)]
reranker = Reranker(folder, backend=backend, threads=threads)
before = reranker.score(pairs)
others = [threading.Thread(target=reranker.score, args=[pairs * 5]) for _ in range(at_work)]
for thread in others:
    thread.start()
if sys.argv[5:]:
    time.sleep(0.05)
    reranker.close()
child = os.fork()
if child == 0:
    print(json.dumps(abs(reranker.score(pairs) - before).max()), flush=True)
    reranker.close()
    print(json.dumps(abs(reranker.score(pairs) - before).max()), flush=True)
    # Dropped, and then as web workers end: no destructor may wait for the parent's threads.
    del reranker, others
    gc.collect()
    sys.exit(7)
for thread in others:
    thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert abs(reranker.score(pairs) - before).max() < 1e-6
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("openvino", "mlx")])
@pytest.mark.parametrize("arguments", ["0 0", "0 2", "1 0", "1 2", "0 2 closed"])
def test_a_forked_child_gives_the_same_scores(
    bundle: Path, checkpoint_of: Callable[[str], Path], backend: str, arguments: str
) -> None:
    """A web server's worker: forked after its parent scored, while threads score, or on close."""
    model = checkpoint_of("bert") if backend == "torch" else bundle
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(model), backend, *arguments.split()],
        capture_output=True,
        text=True,
        # Only a hang takes this long: the run takes two seconds.
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    differences = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(differences) == 2
    assert max(differences) < 1e-6


FORK_OF_OPENVINO = """
import os, sys, threading
from qrank import Reranker

pairs = [("which planet is red?", "mars is red " * n) for n in range(12)]
reranker = Reranker(sys.argv[1])
before = reranker.score(pairs)
others = [threading.Thread(target=reranker.score, args=[pairs * 5]) for _ in range(2)]
for thread in others:
    thread.start()
child = os.fork()
if child == 0:
    calls = [threading.Thread(target=reranker.score, args=[pairs]) for _ in range(3)]
    for thread in calls:
        thread.start()
    print(abs(reranker.score(pairs) - before).max(), reranker.target.name, flush=True)
    for thread in calls:
        thread.join()
    reranker.close()
    print(len(reranker.score(pairs)), reranker.target.name, flush=True)
    sys.exit(7)
for thread in others:
    thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert (reranker.score(pairs) == before).all()
print(reranker.target.name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_takes_the_next_target_where_openvino_cannot_run(
    bundle: Path, tmp_path: Path
) -> None:
    """A web server's worker, of an application that named no backend."""
    folder = subset(bundle, tmp_path / "two", ["onnx-int8", "openvino-int8"])
    done = subprocess.run(
        [sys.executable, "-c", FORK_OF_OPENVINO, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("taking the next target: openvino-int8@cpu: openvino cannot run in a")
    assert "make the Reranker after the fork" in warning
    first, again, parent = done.stdout.splitlines()
    difference, target = first.split()
    assert float(difference) < 0.1
    assert target == "onnx-int8@cpu"
    assert again == "12 onnx-int8@cpu"
    assert parent == "openvino-int8@cpu"


FORK_BESIDE_LOCKS = """
import os, threading, time
from qrank.backends.forks import waited_for

outer, inner = waited_for(threading.RLock()), waited_for(threading.Lock())

def hold():
    with outer:
        time.sleep(0.2)
        with inner:
            time.sleep(0.2)

for _ in range(3):
    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.1)
    if os.fork() == 0:
        free = inner.acquire(timeout=5) and outer.acquire(timeout=5)
        os._exit(0 if free else 1)
    holder.join()
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_waits_for_a_thread_that_holds_one_lock_and_takes_another() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK_BESIDE_LOCKS], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


FORKS_AT_ONCE = """
import os, sys, threading
from qrank.backends.forks import waited_for

sys.setswitchinterval(1e-6)
locks = [waited_for(kind()) for kind in (threading.RLock, threading.Lock) * 4]

def fork():
    for _ in range(20):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)

threads = [threading.Thread(target=fork, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert not any(thread.is_alive() for thread in threads)
assert all(lock.acquire(blocking=False) for lock in locks)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_that_fork_at_once_leave_every_lock_free() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS_AT_ONCE], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")


FORK_WHILE_LOADING = """
import os, sys, threading, time
from qrank import Reranker

reranker = Reranker(sys.argv[1], backend="fakes:slow")
reranker.close()
loading = threading.Thread(target=lambda: reranker.score([("a", "a")]))
loading.start()
time.sleep(0.1)
child = os.fork()
if child == 0:
    os._exit(0 if len(reranker.score([("a", "a")])) == 1 else 1)
loading.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_waits_until_a_model_is_loaded(bundle: Path) -> None:
    """The loading thread holds a lock but does not exist in the child."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_WHILE_LOADING, str(bundle)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
