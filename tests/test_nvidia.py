"""NVIDIA's cards, played by the CPU: which exist, what onnxruntime is told, what users are told."""

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from qrank import Reranker, backends
from qrank.backends import Options, gguf, isolation, keys, llama, nvidia, onnx
from qrank.backends import torch as torch_backend
from qrank.backends.contract import kind, number
from qrank.backends.onnx_graph import OnnxBackend
from qrank.bundle.locate import bundled
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Sequences
from qrank.cli import main
from qrank.errors import TargetError
from qrank.scoring.memory import MemoryBudget
from qrank.select.targets import convertible, guesses
from qrank.system import cache, subprocess_rpc

CPU, CUDA, TENSORRT = onnx.PROVIDERS["cpu"], onnx.PROVIDERS["cuda"], onnx.PROVIDERS["tensorrt"]

QUERY = "which planet is red?"
DOCUMENTS = ["mars is red " * count for count in (1, 5, 2, 40, 3, 4)]

Session = onnxruntime.InferenceSession


class Driver:
    """CUDA's driver, with a card for each size in gigabytes."""

    def __init__(self, *cards: int) -> None:
        self._cards = cards

    def getInferLibVersion(self) -> int:  # noqa: N802
        return 101600

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self._cards else 100

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._cards)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return 0 if number < len(self._cards) else 101

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        size._obj.value = self._cards[device.value] * 2**30
        return 0


Given = list[tuple[str, dict[str, str]]]
"""Providers with their options."""

load = ctypes.CDLL


def drive(monkeypatch: pytest.MonkeyPatch, *cards: int) -> None:
    """Let NVIDIA's libraries be a `Driver`."""

    def library(name: Any, *more: Any, **named: Any) -> Any:
        if "cuda" in str(name) or "nvinfer" in str(name):
            return Driver(*cards)
        return load(name, *more, **named)

    monkeypatch.setattr(ctypes, "CDLL", library)


@pytest.fixture(scope="module")
def causal(bundle_of: Callable[[str], Path]) -> Path:
    """A causal model's bundle, made by the real CPU."""
    return bundle_of("qwen3")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> list[Given]:
    """Two cards of 8 and 24 GB, which the CPU plays; returns the providers each session got."""
    asked: list[Given] = []

    def session(graph: Any, settings: Any, *, providers: Any, **more: Any) -> Any:
        if providers == [CPU]:
            return Session(graph, settings, providers=providers, **more)
        asked.append(providers)
        engines = providers[0][1].get("trt_engine_cache_path")
        if engines is not None:
            (Path(engines) / "built.engine").touch()
        made = Session(graph, settings, providers=[CPU], **more)
        first = providers[0][0]
        made.get_providers = lambda: [first, CPU]
        node = SimpleNamespace(op_type="MatMul")
        part = SimpleNamespace(ep_name=first, get_nodes=lambda: [node])
        made.get_provider_graph_assignment_info = lambda: [part]
        return made

    drive(monkeypatch, 8, 24)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    # A child process would have none of this.
    monkeypatch.setattr(subprocess_rpc, "wanted", lambda: False)
    return asked


def opened(device: str, name: str = "onnx-int8", folder: Path | None = None) -> OnnxBackend:
    folder = folder or bundled()["mini"]
    return onnx.open(folder, Manifest.load(folder).variants[name], device, Options(1))


# Which there are


def test_a_device_has_a_kind_and_a_number() -> None:
    assert [kind(name) for name in ("cpu", "cuda:1", "gpu.1", "npu")] == [
        "cpu",
        "cuda",
        "gpu",
        "npu",
    ]
    assert [number(name) for name in ("cuda", "tensorrt:3")] == [0, 3]


def test_every_card_is_a_device_with_its_own_memory(
    cards: list[Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onnx.devices() == ["cpu", "cuda", "cuda:1", "tensorrt", "tensorrt:1"]
    sizes = [backends.memory("onnx", name) for name in ("cuda", "tensorrt:1", "cuda:2", "cuda:x")]
    assert sizes == [8 * 2**30, 24 * 2**30, None, None]
    assert [backends.memory("onnx", device) for device in ("cpu", "coreml")] == 2 * [None]
    drive(monkeypatch)
    assert onnx.devices() == ["cpu"]


def test_torch_and_llama_cpp_number_cards_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = {0: SimpleNamespace(total_memory=8), 1: SimpleNamespace(total_memory=24)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    assert torch_backend.devices()[:3] == ["cpu", "cuda", "cuda:1"]
    assert [backends.memory("torch", name) for name in ("cuda", "cuda:1", "cuda:2")] == [
        8,
        24,
        None,
    ]
    found = {b"CPU": 1, b"CUDA0": 2, b"CUDA1": 3}
    ggml = SimpleNamespace(ggml_backend_dev_by_name=found.get)
    monkeypatch.setattr(llama, "tensors", lambda: ggml)
    llama.device_pointer.cache_clear()
    assert gguf.devices() == ["cpu", "cuda", "cuda:1"]
    llama.device_pointer.cache_clear()


def test_results_belong_to_the_cards_that_a_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plain = [keys.conditions("onnx", device) for device in ("cpu", "cuda", "cuda:1")]
    assert plain[1] != plain[2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    other = [keys.conditions("onnx", device) for device in ("cpu", "cuda", "cuda:1")]
    assert [a == b for a, b in zip(plain, other, strict=True)] == [True, False, False]


# What onnxruntime is told


def test_a_card_is_named_by_its_number_through_every_door(
    onnx_only: Path, cards: list[Given], tmp_path: Path
) -> None:
    with Reranker(onnx_only) as cpu, Reranker(onnx_only, device="cuda:1") as second:
        assert second.target.name == "onnx-int8@cuda:1"
        pairs = [(QUERY, document) for document in DOCUMENTS]
        np.testing.assert_allclose(second.score(pairs), cpu.score(pairs), atol=0.02)
    (((name, options),),) = cards
    assert (name, options["device_id"]) == (CUDA, "1")
    assert (options["use_tf32"], options["arena_extend_strategy"]) == ("0", "kSameAsRequested")
    with Reranker(onnx_only, device="cuda:0") as first:
        assert first.target.name == "onnx-int8@cuda"
    (tmp_path / "d.txt").write_text("mars is red\n", "utf-8")
    command = ["score", "-m", str(onnx_only), "-q", QUERY, str(tmp_path / "d.txt"), "-f", "json"]
    result = CliRunner().invoke(main, [*command, "--device", "tensorrt:1"])
    assert '"target": "onnx-int8@tensorrt:1"' in result.stdout, result.stderr
    assert [options["device_id"] for _, options in cards[-1]] == ["1", "1"]
    refused = CliRunner().invoke(main, [*command, "--device", "cuda:2"])
    assert "no device 'cuda:2'; present are: cpu, cuda, cuda:1, tensorrt" in refused.stderr


def test_tensorrt_gets_an_engine_for_each_length_which_is_kept(
    cards: list[Given], bundle: Path
) -> None:
    manifest = Manifest.load(bundle)
    variant = manifest.variants["onnx-fp16"]
    work = manifest.probes.work
    for _ in range(2):
        backend = onnx.open(bundle, variant, "tensorrt", Options(1, max_batch_tokens=1000))
        np.testing.assert_allclose(backend.logits(work), manifest.probes.logits, atol=0.05)
        backend.close()
    half = len(cards) // 2
    assert cards[:half] != cards[half:]  # built in one folder, loaded from another
    lengths = set()
    for place, providers in enumerate(cards):
        (first, options), (second, _) = providers
        assert (first, second) == (TENSORRT, CUDA)
        assert options["trt_fp16_enable"] == "True"
        (rows, length), *others = (
            part.partition(":")[2].split("x")
            for part in options["trt_profile_max_shapes"].split(",")
        )
        assert all(other == [rows, length] for other in others)
        assert int(rows) * int(length) <= 1000
        assert options["trt_profile_min_shapes"].startswith(f"input_ids:1x{length},")
        lengths.add(length)
        kept = Path(options["trt_engine_cache_path"])
        assert kept.exists() == (place >= half)
    assert len(lengths) == half > 1
    assert cache.usage()["tensorrt"].records == half


def test_libraries_that_pip_installed_are_loaded_and_their_version_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tensorrt_libs"
    folder.mkdir()
    for name in ("libnvonnxparser.so.10", "libnvinfer.so.10", "libnvinfer_plugin.so.10"):
        (folder / name).touch()
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(Path(name).name)
        if name == "libnvinfer.so.10":
            return SimpleNamespace(getInferLibVersion=lambda: 101600)
        raise OSError(f"{name}: not really")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", load)
    said = nvidia.load_libraries(SimpleNamespace(), "tensorrt")
    assert loaded == ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"]
    assert said == f"{folder / 'libnvinfer.so.10'}: not really"
    assert nvidia.load_libraries(SimpleNamespace(), "cuda") == ""
    assert nvidia.tensorrt_version() == 101600


def test_tensorrt_refuses_a_causal_model(cards: list[Given], causal: Path) -> None:
    with pytest.raises(TargetError, match=r"causal model's prefix: take device cuda:1"):
        opened("tensorrt:1", "onnx-fp32", causal)


def test_a_prefix_stays_on_the_card(causal: Path) -> None:
    """The CPU's build can bind outputs too: what a card would keep is never an array here."""
    manifest = Manifest.load(causal)
    path = causal / "onnx-fp32" / "model.onnx"
    session = Session(str(path), providers=[CPU])
    backend = OnnxBackend(
        lambda shape: session,
        batch=64,
        streams=1,
        memory=MemoryBudget(),
        holder=("cpu", 0),
    )
    kept: list[Any] = []
    compute = backend._compute

    def seen(output: str, batch: Any, more: dict[str, Any]) -> Any:
        kept.append(more["prefix"])
        return compute(output, batch, more)

    backend._compute = seen  # type: ignore[method-assign]
    probes = manifest.probes
    prefix = probes.work.ids[0][:4]
    alike = [place for place, ids in enumerate(probes.work.ids) if (ids[:4] == prefix).all()]
    work = Sequences([probes.work.ids[place][4:] for place in alike], prefix=prefix)
    np.testing.assert_allclose(backend.logits(work), probes.logits[alike], atol=1e-3)
    assert len(kept) > 3
    assert isinstance(kept[0], np.ndarray)
    assert all(isinstance(each, onnxruntime.OrtValue) for each in kept[1:])
    backend.close()


def test_floating_point_comes_before_int8_on_cards() -> None:
    assert [p for _, p in convertible("onnx", "cuda:1")] == ["fp16", "fp32", "int8", "int4"]
    assert convertible("onnx", "cpu")[0] == ("onnx", "int8")


def test_torch_has_the_fastest_precision_and_attention_on_cards(
    checkpoint_of: Callable[[str], Path],
) -> None:
    reranker = Reranker(checkpoint_of("qwen3"), backend="torch", family="qwen3-reranker")
    ordered = guesses(reranker.engine.manifest, "torch", "cuda:1")
    assert [target.name for target in ordered] == [
        f"torch-{precision}@cuda:1" for precision in ("fp16", "bf16", "fp32")
    ]
    scorer = vars(reranker.engine)["_backend"]._scorer
    assert scorer.model.config._attn_implementation == "sdpa"
    reranker.close()


def test_building_engines_is_no_hang() -> None:
    cpu, gpu, engines = (
        isolation.limit("onnx", 10**8, 1000, name) for name in ("cpu", "cuda:1", "tensorrt:1")
    )
    assert cpu < gpu < engines
    assert engines > 1800


# What users are told


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Packages that claim to have put files into a folder `onnxruntime`."""

    def install(**packages: str) -> None:
        for name, file in packages.items():
            info = tmp_path / f"{name}-1.31.1.dist-info"
            info.mkdir()
            (info / "RECORD").write_text(f"{file},sha256=abc,10\n", "utf-8")

    find = importlib.util.find_spec
    origin = SimpleNamespace(origin=str(tmp_path / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: origin if name == "onnxruntime" else find(name, *more),
    )
    return install


def test_builds_that_overwrite_each_other_are_told_and_what_to_do(
    cards: list[Given], installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(
        onnxruntime="onnxruntime/__init__.py",
        onnxruntime_extensions="onnxruntime_extensions/__init__.py",
    )
    assert onnx.SPEC.conflict() == ""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(TargetError) as error:
        opened("cuda")
    assert str(error.value).endswith(
        'This build has no CUDA: pip uninstall -y onnxruntime, then pip install "qrank[gpu]"'
    )
    installed(onnxruntime_gpu="onnxruntime/__init__.py")
    both = "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall -y onnxruntime "
    assert onnx.SPEC.conflict().startswith(f"{both}onnxruntime-gpu, then")
    with pytest.raises(TargetError, match=r'overwrite each other.*pip install "qrank\[gpu\]"'):
        opened("cuda")


def test_a_driver_without_a_card_is_told(
    cards: list[Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str) -> Driver:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(TargetError, match=r"no device 'cuda'.*NVIDIA's driver finds no card"):
        opened("cuda")


def test_missing_libraries_are_told_in_onnxruntimes_words(
    cards: list[Given],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As onnxruntime-gpu 1.31 does: it prints, falls back, and raises nothing."""

    def preload() -> None:
        sys.stdout.write("Failed to load libcublasLt.so.13: cannot open\nFailed to load more\n")

    def fallen(graph: Any, settings: Any, *, providers: Any, **more: Any) -> Any:
        return Session(graph, settings, providers=[CPU], **more)

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen)
    with pytest.raises(TargetError) as error:
        opened("cuda")
    message = str(error.value)
    assert "fell back from CUDAExecutionProvider to CPUExecutionProvider" in message
    assert "(Failed to load libcublasLt.so.13: cannot open)" in message
    assert 'pip install "qrank[gpu]"' in message
    assert capsys.readouterr().out == ""
