"""ONNX Runtime where it has little: memory, threads, and doubles of devices that are not here."""

import ctypes
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qrank import Reranker, backends, machine
from qrank.backends import Options, gguf, onnx
from qrank.bundle import Manifest
from qrank.errors import TargetError
from qrank.locate import bundled
from qrank.memory import Memory

QUERY = "which planet is red?"
DOCUMENTS = ["mars is red " * count for count in (1, 5, 2, 90, 3, 4)]

run = onnxruntime.InferenceSession.run


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Memory for so many padded tokens; beyond, what onnxruntime raises on a GPU."""

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
    with Reranker("mini", backend="onnx", batch=10**6) as reranker:
        expected = reranker.score(pairs, raw=True)
        tried = room(600)
        found = reranker.score(pairs, raw=True)
    assert max(tried) > 600
    np.testing.assert_allclose(found, expected, atol=0.02 * np.ptp(expected))


def test_a_pair_that_memory_does_not_suffice_for_is_told_and_the_next_call_works(
    room: Callable[[int], list[int]],
) -> None:
    with Reranker("mini", backend="onnx", batch=10**6) as reranker:
        room(100)
        with pytest.raises(TargetError, match=r"a single pair of \d+ tokens: .*--max-length"):
            reranker.rank(QUERY, DOCUMENTS)
        assert len(reranker.rank(QUERY, DOCUMENTS[:2])) == 2


# Devices that are not here


@pytest.fixture
def coreml(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A CPU that claims to be CoreML, and to compute so many of a graph's 74 matrix products."""
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
    """A part of a graph, as onnxruntime tells who computes it."""
    names = [name for name, count in nodes.items() for _ in range(count)]
    made = [SimpleNamespace(op_type=name) for name in names]
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: made)


def opened(device: str) -> onnx.OnnxBackend:
    folder = bundled()["mini"]
    variant = Manifest.load(folder).variants["onnx-int8"]
    return onnx.open(folder, variant, device, Options(1))


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


class Driver:
    """CUDA's, of a GPU of 8 GB; or without one."""

    def __init__(self, there: bool) -> None:
        self._there = there

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self._there else 100

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        size._obj.value = 8 * 2**30
        return 0


def test_batches_on_a_gpu_are_cut_by_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    dimensions = Manifest.load(bundled()["mini"]).dimensions
    assert dimensions is not None
    monkeypatch.setattr(machine, "memory", lambda: 256 * 2**30)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(True))
    assert backends.memory("onnx", "cpu") is None
    assert backends.memory("onnx", "coreml") is None
    for device in ("cuda", "tensorrt"):
        whole = backends.memory("onnx", device)
        assert whole == 8 * 2**30
    most = Memory.beside(2**30, None, dimensions, whole).most(512)
    assert most == 7 * 2**30 // 2 // dimensions.taken(512)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(False))
    assert backends.memory("onnx", "cuda") is None


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_device_that_is_absent_has_no_memory(backend: str) -> None:
    """So that opening it says that it is absent."""
    for device in ("cuda", "tensorrt", "gpu", "gpu.1", "npu", "metal", "mps", "nonsense"):
        if device not in backends.module(backend).devices():
            assert backends.memory(backend, device) is None


def test_llama_cpp_tells_what_a_device_has() -> None:
    """Here of the CPU, whose memory is the machine's."""
    assert gguf.memory("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
