"""Memory for batches: how much they take, how they share it, and what does not fit."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import subset
from hypothesis import given
from hypothesis import strategies as st

from qrank import Reranker
from qrank.bundle.dimensions import Dimensions
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Sequences
from qrank.cli import main
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, InputError, TargetError
from qrank.scoring.batching import cut, cut_ragged
from qrank.scoring.memory import MemoryBudget
from qrank.system import machine

QWEN3 = Dimensions(live_layers=12, hidden=1024, intermediate=3072, heads=16, key_heads=8, width=128)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    before=st.integers(0, 300),
    size=st.integers(1, 10**9),
    limit=st.integers(1, 4000),
    streams=st.integers(1, 9),
)
def test_batches_hold_everything_once_and_find_memory(
    lengths: list[int], before: int, size: int, limit: int, streams: int
) -> None:
    memory = MemoryBudget(size, QWEN3)
    work = Sequences([np.zeros(n, np.int32) for n in lengths], prefix=np.zeros(before, np.int32))
    padded = cut(work, limit, memory, streams)
    ragged = cut_ragged(lengths, limit, 16, lambda n: memory.max_batch_size(n, before))
    for batches in (padded, ragged):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or len(batch) * QWEN3.estimate_bytes(longest, before) <= size


@pytest.mark.parametrize(
    ("count", "length", "limit", "streams", "sizes"),
    [
        (20, 64, 1280, 2, [10, 10]),
        (20, 64, 640, 3, [7, 7, 6]),
        (20, 64, 320, 3, [4, 4, 4, 4, 4]),
        (3, 500, 160, 2, [1, 1, 1]),
        (1, 5, 160, 8, [1]),
        (4, 5, 160, 8, [1, 1, 1, 1]),
        (5, 64, 0, 2, [1, 1, 1, 1, 1]),
    ],
)
def test_every_stream_gets_as_much_to_do(
    count: int, length: int, limit: int, streams: int, sizes: list[int]
) -> None:
    """The shared prefix does not count: it is computed once."""
    work = Sequences([np.zeros(length, np.int32)] * count, prefix=np.zeros(300, np.int32))
    assert list(map(len, cut(work, limit, MemoryBudget(), streams))) == sizes


@given(st.integers(1, 4000), st.integers(0, 500))
def test_more_tokens_take_more(length: int, before: int) -> None:
    taken = QWEN3.estimate_bytes(length, before)
    assert QWEN3.estimate_bytes(length + 1, before) > taken
    assert QWEN3.estimate_bytes(length, before + 1) > taken


def test_a_manifest_keeps_its_keys() -> None:
    """Earlier bundles call `live_layers` `held`."""
    content = QWEN3.to_json()
    assert content == {
        **{"held": 12, "hidden": 1024, "intermediate": 3072},
        **{"heads": 16, "key_heads": 8, "width": 128},
    }
    assert Dimensions.from_json(content) == QWEN3


def test_batches_side_by_side_share_what_there_is() -> None:
    one = QWEN3.estimate_bytes(100)
    memory = MemoryBudget(2 * one, QWEN3)
    lock = threading.Lock()
    running, most = 0, 0
    both = threading.Barrier(2, timeout=30)

    def run(count: int, meet: bool) -> None:
        nonlocal running, most
        with memory.reserve(count, 100):
            with lock:
                running += count
                most = max(most, running)
            if meet:
                both.wait()
            with lock:
                running -= count

    # Two batches of one fit at once, or the barrier would break; a mix never exceeds two in all.
    for counts, meet in (([1, 1], True), ([2, 1, 2, 9, 2, 1], False)):
        threads = [threading.Thread(target=run, args=(min(c, 2), meet)) for c in counts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "it never got its share"
    assert running == 0
    assert most == 2


def test_first_come_first_served() -> None:
    """Small batches do not overtake a large one that waits, or it would wait forever."""
    one = QWEN3.estimate_bytes(100)
    memory = MemoryBudget(10 * one, QWEN3)
    entered: SimpleQueue[int] = SimpleQueue()

    def run(count: int) -> None:
        with memory.reserve(count, 100):
            entered.put(count)

    with ThreadPoolExecutor(3) as pool:
        with memory.reserve(6, 100):
            waiting = [pool.submit(run, 10)]
            while not waiting[0].running():
                time.sleep(0.01)
            time.sleep(0.1)
            waiting += [pool.submit(run, count) for count in (1, 2)]
            time.sleep(0.2)
            assert entered.empty()
        for future in waiting:
            future.result(30)
    assert entered.get() == 10
    assert {entered.get(), entered.get()} == {1, 2}


def test_processes_that_share_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: 10**9)

    def most() -> list[int]:
        machines, devices = (MemoryBudget.beside(10**8, None, QWEN3) for _ in range(2))
        devices.move(10**9, 10**8)
        found = (each.max_batch_size(5) for each in (machines, devices))
        return [count for count in found if count]

    alone = most()
    monkeypatch.setattr(MemoryBudget, "sharers", 4)
    # Each has a fourth, with the model in it: a sixth is left for batches.
    assert most() == [count // 6 for count in alone]


def test_one_that_needs_everything_gets_it_beside_a_stream_of_small_ones() -> None:
    memory = MemoryBudget(4 * QWEN3.estimate_bytes(100), QWEN3)
    done = threading.Event()

    def small() -> None:
        while not done.is_set():
            with memory.reserve(2, 100):
                time.sleep(0.002)

    def large() -> None:
        with memory.reserve(4, 100):
            pass

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(small) for _ in range(5)]
        try:
            for _ in range(10):
                pool.submit(large).result(30)
        finally:
            done.set()
        for stream in streams:
            stream.result(30)


def test_one_that_is_interrupted_as_it_waits_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Ctrl-C, which Python raises in the main thread at any point."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    memory = MemoryBudget(QWEN3.estimate_bytes(100), QWEN3)
    with memory.reserve(1, 100), monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), memory.reserve(1, 100):
            pass

    def another() -> None:
        with memory.reserve(1, 100):
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(another).result(30)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_bounded_it_ranks_the_same(bundle_of: Callable[[str], Path], kind: str) -> None:
    bundle = bundle_of(kind)
    manifest = Manifest.load(bundle)
    documents = ["a " * n for n in (1, 40, 3, 25, 60, 60, 60)]
    dimensions = manifest.dimensions
    assert dimensions is not None
    for variant in manifest.variants.values():
        with Reranker(bundle, backend=variant.name) as free:
            expected = {r.index: r.logit for r in free.rank("a b c", documents)}
        most = variant.bytes + dimensions.estimate_bytes(210)
        with Reranker(bundle, backend=variant.name, max_memory=most) as bounded:
            found = {r.index: r.logit for r in bounded.rank("a b c", documents)}
        spread = np.ptp(list(expected.values()))
        for index, logit in expected.items():
            assert found[index] == pytest.approx(logit, abs=0.01 * spread), variant.name


def test_a_document_that_cannot_fit_is_named(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    variant, dimensions = manifest.variants["onnx-int8"], manifest.dimensions
    assert dimensions is not None
    most = variant.bytes + dimensions.estimate_bytes(20)
    with Reranker(bundle, backend="onnx-int8", max_memory=most) as reranker:
        assert len(reranker.rank("a", ["b", "c d"])) == 2
        with pytest.raises(InputError, match=r"document 1 has \d+ tokens.*--max-memory.*--max-len"):
            reranker.rank("a", ["b", "c d " * 30, "e"])
        assert len(reranker.rank("a", ["b"])) == 1


def test_where_the_files_alone_take_more_the_next_target_is_taken(bundle: Path) -> None:
    variants = Manifest.load(bundle).variants
    smallest = min(variants.values(), key=lambda v: v.bytes)
    with pytest.raises(TargetError, match=r"its files alone take [\d,]+ MB, and --max-memory is"):
        Reranker(bundle, backend=smallest.name, max_memory=smallest.bytes)
    with pytest.raises(TargetError, match="no target works here"):
        Reranker(bundle, max_memory=1000)
    with Reranker(bundle, max_memory=2 * smallest.bytes) as reranker:
        assert reranker.target.variant.bytes < 2 * smallest.bytes
    with pytest.raises(InputError, match="max_memory is 0"):
        Reranker(bundle, max_memory=0)


def test_a_bundle_of_before_says_nothing_and_cannot_be_bounded(
    bundle: Path, tmp_path: Path
) -> None:
    old = subset(bundle, tmp_path / "old", ["onnx-int8"])
    replace(Manifest.load(old), dimensions=None).save(old)
    assert "dimensions" not in (old / "qrank.json").read_text("utf-8")
    with Reranker(old) as reranker:
        assert len(reranker.rank("a", ["b", "c"])) == 2
    with pytest.raises(TargetError, match=r"does not say its model's dimensions.*convert it again"):
        Reranker(old, max_memory=10**9)


def test_a_conversion_that_memory_cannot_suffice_for_is_refused_before_any_work(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_of("bert")
    whole = 4 * read_checkpoint(str(source)).parameters()
    monkeypatch.setattr(machine, "memory", lambda: int(0.6 * whole))
    with pytest.raises(ConversionError, match=r"to openvino-int8 takes .* has .*: take --to gguf "):
        convert(str(source), [("openvino", "int8")], tmp_path / "bundle")
    monkeypatch.setattr(machine, "memory", lambda: int(0.3 * whole))
    with pytest.raises(ConversionError, match=r"gguf-q8_0 takes .*: take a larger machine"):
        convert(str(source), [("gguf", "q8_0")], tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "code"), [("1G", 0), ("512 MiB", 0), ("1k", 3), ("much", 2), ("-1", 2), ("9" * 400, 2)]
)
def test_sizes_on_the_command_line(bundle: Path, size: str, code: int) -> None:
    arguments = ["score", "-m", str(bundle), "-q", "a", "--max-memory", size]
    result = CliRunner().invoke(main, arguments, input="b\nc\n")
    assert (result.exit_code == 0) == (code == 0), result.output
    if code == 2:
        assert "is no size; give one like 512M or 4G" in result.output
