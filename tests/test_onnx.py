"""ONNX Runtime with limited memory and threads, and on fake devices."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrank import Reranker, backends
from qrank.backends import Options, gguf, onnx
from qrank.backends.onnx_graph import OnnxBackend
from qrank.bundle.locate import bundled
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Sequences
from qrank.errors import TargetError
from qrank.scoring.memory import MemoryBudget

QUERY = "which planet is red?"
DOCUMENTS = ["mars is red " * count for count in (1, 5, 2, 40, 3, 4)]

run = onnxruntime.InferenceSession.run


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Limit batches to `tokens` padded tokens; beyond, raise like onnxruntime on a GPU."""

    def limit(tokens: int) -> list[int]:
        tried: list[int] = []

        def limited(session: Any, outputs: list[str], inputs: dict[str, Any]) -> Any:
            tried.append(inputs["input_ids"].size)
            if tried[-1] > tokens:
                raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
                    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned "
                    "while running MatMul node. Status Message: Failed to allocate memory for "
                    f"requested buffer of size {4 * tried[-1]}"
                )
            return run(session, outputs, inputs)

        monkeypatch.setattr(onnxruntime.InferenceSession, "run", limited)
        return tried

    return limit


def test_where_memory_does_not_suffice_smaller_batches_give_the_same(
    room: Callable[[int], list[int]],
) -> None:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    # One thread, so that a request is not cut for several streams.
    with Reranker("mini", backend="onnx", max_batch_tokens=10**6, threads=1) as reranker:
        expected = reranker.score(pairs, raw=True)
        tried = room(300)
        found = reranker.score(pairs, raw=True)
    assert max(tried) > 300
    np.testing.assert_allclose(found, expected, atol=0.02 * float(np.ptp(expected)))


def test_a_pair_that_memory_does_not_suffice_for_is_told_and_the_next_call_works(
    room: Callable[[int], list[int]],
) -> None:
    with Reranker("mini", backend="onnx", max_batch_tokens=10**6) as reranker:
        room(100)
        with pytest.raises(TargetError, match=r"a single pair of \d+ tokens: .*--max-length"):
            reranker.rank(QUERY, DOCUMENTS)
        assert len(reranker.rank(QUERY, DOCUMENTS[:2])) == 2


THREADS = """
import os, sys
from qrank import Reranker

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
documents = ["mars is red " * count for count in range(1, 30)]
with Reranker("mini", backend="onnx", threads=int(sys.argv[1])) as reranker:
    reranker.rank("which planet is red?", documents)
    print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no such folder here")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_more_threads_compute_than_may(threads: int) -> None:
    """Streams and the session's own threads count together; the calling thread only waits."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(threads)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= threads


# Few shapes, as TensorRT wants them


def test_few_shapes_give_the_same() -> None:
    manifest = Manifest.load(bundled()["mini"])
    work = manifest.probes.work.take(np.flatnonzero(manifest.probes.work.lengths < 128))
    found = []
    for static in (False, True):
        options = Options(2, max_batch_tokens=1024, static_shapes=static)
        backend = onnx.open(bundled()["mini"], manifest.variants["onnx-int8"], "cpu", options)
        found.append(backend.logits(work))
        backend.close()
    # Scales are per token: a score ignores the padding, but for the last bits.
    np.testing.assert_allclose(found[1], found[0], atol=0.05)


class Counted:
    """A session that only counts the shapes it is given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="input_ids", shape=["batch", "length"])]

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        self.shapes.append(inputs["input_ids"].shape)
        return [inputs["input_ids"][:, :1].astype(np.float32)]


@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=200),
    limit=st.sampled_from([48, 500, 512]),
    tokens=st.integers(1, 40_000),
)
def test_shapes_are_few_and_bounded_and_every_sequence_gets_its_own_logit(
    lengths: list[int], limit: int, tokens: int
) -> None:
    session = Counted()
    lengths = [min(length, limit) for length in lengths]
    backend = OnnxBackend(
        lambda shape: session, batch=tokens, streams=1, memory=MemoryBudget(), limit=limit
    )
    ids = [np.full(length, place, np.int32) for place, length in enumerate(lengths)]
    assert backend.logits(Sequences(ids)).tolist() == list(range(len(lengths)))
    backend.close()
    for rows, length in session.shapes:
        assert length == limit or (length >= 64 and length.bit_count() == 1 and length < limit)
        assert rows == 1 or rows * length <= tokens
        assert rows.bit_count() == 1 or rows == tokens // length
    assert len(set(session.shapes)) <= 4 * 10


def test_a_thousand_mixed_documents_make_a_handful_of_shapes() -> None:
    session = Counted()
    lengths = np.random.default_rng(0).integers(12, 513, 1000)
    backend = OnnxBackend(
        lambda shape: session, batch=16_384, streams=1, memory=MemoryBudget(), limit=512
    )
    backend.logits(Sequences([np.zeros(length, np.int32) for length in lengths]))
    backend.close()
    assert len(session.shapes) == 24
    assert len(set(session.shapes)) == 4
    padded = sum(rows * length for rows, length in session.shapes)
    assert padded < 1.5 * lengths.sum()


# Fake devices


@pytest.fixture
def coreml(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A CPU that claims to be CoreML and to compute `products` of a graph's 74 matrix products."""
    mine, rest = "CoreMLExecutionProvider", "CPUExecutionProvider"
    real = onnxruntime.InferenceSession

    def pretend(products: int) -> None:
        def session(path: str, settings: Any, *, providers: list[str], **more: Any) -> Any:
            assert providers == [mine]
            assert more == {"enable_fallback": 0}
            entry = "session.record_ep_graph_assignment_info"
            assert settings.get_session_config_entry(entry) == "1"
            made = real(path, settings, providers=[rest], **more)
            made.get_providers = lambda: [mine, rest]
            parts = [part(rest, Shape=9, Add=90), part(mine, MatMul=products, Gelu=8)]
            parts += [part(rest, FusedGemm=24), part(rest, MatMulIntegerToFloat=50 - products)]
            made.get_provider_graph_assignment_info = lambda: parts
            return made

        monkeypatch.setattr(onnxruntime, "InferenceSession", session)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [mine, rest])
    return pretend


def part(provider: str, **nodes: int) -> Any:
    """A part of a graph, in onnxruntime's record of which provider computes it."""
    names = [name for name, count in nodes.items() for _ in range(count)]
    made = [SimpleNamespace(op_type=name) for name in names]
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: made)


def opened(device: str) -> OnnxBackend:
    folder = bundled()["mini"]
    variant = Manifest.load(folder).variants["onnx-int8"]
    return onnx.open(folder, variant, device, Options(1))


@pytest.mark.parametrize(
    ("processor", "sets", "widens"),
    [
        ("x86_64", ["AVX2"], True),
        ("AMD64", ["AVX-512", "VNNI"], False),
        ("x86_64", [], True),
        ("aarch64", ["NEON dot product"], False),
        ("arm64", [], False),
    ],
)
def test_products_are_widened_where_they_would_saturate_and_only_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, processor: str, sets: list[str], widens: bool
) -> None:
    """Elsewhere it halves the speed; ARM CPUs add products of bytes in 32 bits."""
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr("qrank.system.machine.instruction_sets", lambda: sets)
    found: list[str] = []
    add = onnxruntime.SessionOptions.add_session_config_entry

    def seen(settings: Any, key: str, value: str) -> None:
        found.append(key)
        add(settings, key, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", seen)
    variant = Manifest.load(bundle).variants["onnx-int8"]
    onnx.open(bundle, variant, "cpu", Options(1)).close()
    assert ("session.x64quantprecision" in found) == widens


def test_a_device_that_leaves_most_of_the_work_to_the_cpu_is_refused(
    coreml: Callable[[int], None],
) -> None:
    coreml(36)
    with pytest.raises(TargetError, match="only 36 of this graph's 74 matrix products on coreml"):
        opened("coreml")
    coreml(37)
    backend = opened("coreml")
    work = Manifest.load(bundled()["mini"]).probes.work.take(np.array([0]))
    assert backend.logits(work).shape == (1,)
    backend.close()


def test_an_onnxruntime_that_does_not_tell_who_computes_is_believed(
    coreml: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    coreml(0)
    session = onnxruntime.InferenceSession

    def old(*arguments: Any, **more: Any) -> Any:
        made = session(*arguments, **more)
        return SimpleNamespace(get_providers=made.get_providers, get_inputs=made.get_inputs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", old)
    opened("coreml").close()


def test_batches_are_cut_by_the_memory_of_the_device(
    room: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches get half of the device's memory besides the model, whatever the machine has."""
    manifest = Manifest.load(bundled()["mini"])
    assert manifest.dimensions is not None
    pair = manifest.dimensions.estimate_bytes(40)
    whole = manifest.variants["onnx-int8"].bytes + 2 * 3 * pair
    with Reranker("mini", backend="onnx", max_batch_tokens=10**6, threads=1) as reranker:
        tried = room(10**9)
        reranker.score([(QUERY, "mars is red " * 10)] * 12)
        assert max(tried) == tried[0] >= 12 * 30
    monkeypatch.setattr(backends, "memory", lambda name, device: whole)
    with Reranker("mini", backend="onnx", max_batch_tokens=10**6) as reranker:
        tried.clear()
        reranker.score([(QUERY, "mars is red " * 10)] * 12)
        assert max(tried) <= 3 * 40


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_device_that_is_absent_has_no_memory(backend: str) -> None:
    """So the error on opening it says that it is absent."""
    for device in ("cuda", "tensorrt", "gpu", "gpu.1", "npu", "metal", "mps", "nonsense"):
        if device not in backends.spec(backend).devices():
            assert backends.memory(backend, device) is None


def test_llama_cpp_tells_what_a_device_has() -> None:
    """For the CPU, this is the machine's memory."""
    assert gguf.memory("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
