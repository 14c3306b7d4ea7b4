"""OpenVINO only: complete files, fp32 heads, static shapes, compute dtypes, devices, cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import tiny
import tiny_decoders
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification

from qrank import Reranker
from qrank.backends import Backend, Options, openvino, tolerance
from qrank.backends.openvino_cache import compile_or_load
from qrank.backends.openvino_nodes import computed_weights, has_fused_mlp
from qrank.bundle.fidelity import Fidelity, here
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Logits, Sequences
from qrank.cli import main
from qrank.converters.checkpoint.evening import scalings
from qrank.converters.checkpoint.probes import calibration_pairs
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.convert import convert
from qrank.converters.openvino import export as converter
from qrank.converters.openvino.weights import shrink
from qrank.errors import ConversionError, InputError, TargetError
from qrank.system import machine
from qrank.system.extras import need

PRECISIONS = [precision for format, precision in tiny.VARIANTS if format == "openvino"]
PAIRS = [("which planet is red?", "Mars is red. " * n) for n in (1, 0, 9, 30, 200)]


def graph(bundle: Path, precision: str) -> Any:
    return need("openvino").Core().read_model(bundle / f"openvino-{precision}" / "model.xml")


# Conversion


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_head_stays_fp32(
    kind: str,
    precision: str,
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
) -> None:
    """The graph has the checkpoint's head weights."""
    heads = {
        "bert": ["bert.pooler.dense", "classifier"],
        "xlm-roberta": ["classifier.dense", "classifier.out_proj"],
        "modernbert": ["head.dense", "classifier"],
    }
    nodes = graph(bundle_of(kind), precision).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    floats = [c.data for c in constants if c.get_element_type() == need("openvino").Type.f32]
    weights = AutoModelForSequenceClassification.from_pretrained(checkpoint_of(kind)).state_dict()
    for name in next(found for start, found in heads.items() if kind.startswith(start)):
        weight = weights[f"{name}.weight"].numpy()
        assert any(np.array_equal(weight, w) or np.array_equal(weight, w.T) for w in floats), name


@pytest.mark.parametrize(
    ("precision", "small"),
    [
        ("int8", ("u8",)),
        pytest.param("int8-w8a8", ("i8", "u8"), marks=tiny.needs_vnni),
        ("fp16", ("f16",)),
    ],
)
def test_all_other_matrices_are_small(
    kind: str, precision: str, small: tuple[str, ...], bundle_of: Callable[[str], Path]
) -> None:
    nodes = graph(bundle_of(kind), precision).get_ops()
    matrices = [
        node
        for node in nodes
        if node.get_type_name() == "Constant"
        and node.data.ndim == 2
        and min(node.data.shape) >= 64
        and node.get_element_type().to_dtype() != np.bool_
    ]
    kept = [m for m in matrices if m.get_element_type().get_type_name() not in small]
    assert len(matrices) - len(kept) >= 9, "two layers and the words"
    # Only the head's square matrix is left.
    assert [m.data.shape for m in kept] == [(64, 64)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_take_ids_up_to_the_limit_and_give_logits(
    kind: str, precision: str, bundle_of: Callable[[str], Path]
) -> None:
    """Under the usual names, so that other tools can run them too."""
    model = graph(bundle_of(kind), precision)
    expected = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "bert")
    assert [i.any_name for i in model.inputs] == expected
    assert {str(i.partial_shape) for i in model.inputs} == {f"[?,1..{tiny.MAX_LENGTH}]"}
    assert [o.any_name for o in model.outputs] == ["logits"]
    assert model.outputs[0].element_type.get_type_name() == "f32"


def test_graphs_do_not_say_where_they_were_made(bundle: Path) -> None:
    for path in bundle.glob("openvino-*/model.xml"):
        text = path.read_text("utf-8")
        assert str(Path.home()) not in text
        assert "site-packages" not in text
        assert str(bundle.parent) not in text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """Replace the exporter's work by a ready graph."""

    def export(model: object, checkpoint: Checkpoint, path: Path, **options: bool) -> None:
        shutil.copy(bundle / "onnx-fp32" / "model.onnx", path)

    monkeypatch.setattr(converter, "export", export)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("suffix", "keep", "message"),
    [
        (".xml", 0, "wrote 0 bytes of model.xml, which is no XML"),
        (".xml", 1000, "wrote 1000 bytes of model.xml, which is no XML"),
        (".bin", 0, r"wrote 0 bytes of model.bin; its XML speaks of \d"),
        (".bin", 1000, r"wrote 1,000 bytes of model.bin; its XML speaks of \d"),
    ],
)
def test_a_file_that_is_not_whole_is_caught(
    suffix: str,
    keep: int,
    message: str,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """optimum's command may write such files and still exit with code 0."""
    ov = need("openvino")
    save = ov.save_model

    def cut(model: object, path: Path, **options: object) -> None:
        save(model, path, **options)
        os.truncate(path.with_suffix(suffix), keep)

    monkeypatch.setattr(ov, "save_model", cut)
    with pytest.raises(ConversionError, match=message):
        convert(str(checkpoint_of("bert")), [("openvino", "fp16")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_channels_are_evened_out_for_the_pairs_of_the_file_too(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequences] = []

    def record(checkpoint: Checkpoint, calibration: Sequences) -> object:
        seen.append(calibration)
        return scalings(checkpoint, calibration)

    monkeypatch.setattr(converter, "scalings", record)
    # In users' pairs, a special token's name is text and does not refuse the conversion.
    pairs = [{"query": "red?", "document": "mars [SEP]"}, {"query": "why?", "document": ""}] * 9
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    command = ["convert", str(checkpoint_of("bert")), "--to", "openvino", "--precision"]
    command += ["int8", "--calibration", str(path), "-o", str(tmp_path / "out")]
    CliRunner().invoke(main, command)
    (calibration,) = seen
    ours = len(calibration_pairs())
    assert len(calibration) == ours + 18
    assert len(calibration.ids[ours + 1]) < len(calibration.ids[ours])


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no pairs"), ("mars\n", "line 1"), ('{"query": "a", "document": 1}', "line 1")],
)
def test_pairs_that_are_none_are_refused(
    content: str, message: str, bert: str, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=message):
        convert(bert, [("openvino", "int8")], tmp_path / "out", calibration=path)


@tiny.needs_vnni
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_int8_products_have_a_scale_for_each_token(size: float) -> None:
    """Within the rounding of 8 bits on both sides, and nothing in a batch matters to a token."""
    ov, rng = need("openvino"), np.random.default_rng(0)
    weights = rng.standard_normal((96, 64), np.float32)
    x = ov.opset13.parameter([-1, -1, 64], np.float32, name="x")
    product = ov.opset13.matmul(x, ov.opset13.constant(weights), False, True)
    graph = ov.Model([product], [x])
    shrink(graph, "int8-w8a8", keep=set())
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = rng.standard_normal((2, 3, 64), np.float32) * np.float32(size)
    given[1, 2] = 0
    found = np.array(compiled([given])[0])
    exact = given @ weights.T
    steps = np.abs(given).max(-1, keepdims=True) / 127 * np.abs(weights).max()
    assert (np.abs(found - exact) <= 8 * steps).all()
    assert not found[1, 2].any()
    louder = given.copy()
    louder[0, 0] *= 1000
    assert np.array_equal(np.array(compiled([louder])[0])[0, 1:], found[0, 1:])
    assert np.array_equal(np.array(compiled([given[:1, 1:]])[0]), found[:1, 1:])


def constants(compiled: Any, least: int = 2**12) -> set[str]:
    """Precisions in which a compiled CPU graph keeps its large constants."""
    found = set()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        is_constant = info["layerType"].astype(str) == "Const"
        if is_constant and np.prod(list(node.output(0).shape)) >= least:
            found.add(info["outputPrecisions"].astype(str).lower())
    return found


@tiny.needs_vnni
@pytest.mark.parametrize("computed", ["f32", "bf16"])
def test_tables_beside_int8_products_stay_in_8_bits(computed: str) -> None:
    ov, rng = need("openvino"), np.random.default_rng(0)
    weights = [rng.standard_normal((n, 64), np.float32) for n in (96, 80)]
    opset, ids = ov.opset13, np.array([[3, 95, 3], [0, 1, 50]])
    given = opset.parameter([-1, -1], np.int64, name="ids")
    rows = opset.gather(opset.constant(weights[0]), given, np.int64(0))
    rows.set_friendly_name("rows")
    product = opset.matmul(rows, opset.constant(weights[1]), False, True)
    graph = ov.Model([rows, product], [given])
    shrink(graph, "int8-w8a8", keep=set())
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": computed})
    assert constants(compiled) == {"u8", "i8"}
    found, _ = compiled([ids]).values()
    step = np.ptp(weights[0], axis=1)[ids][..., None] / 255
    assert (np.abs(found - weights[0][ids]) <= 0.51 * step + 0.01).all()


# Running


def test_16_bit_weights_are_not_kept_in_fp32_beside_those_packed_for_bf16(bundle: Path) -> None:
    variant = Manifest.load(bundle).variants["openvino-fp16"]
    backend = openvino.open(bundle, variant, "cpu", Options(1, compute_dtype="bf16"))
    # The score head, 64 x 64, stays in fp32.
    assert constants(backend._model(None), least=2**12 + 1) == {"f16"}
    backend.close()


def static(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
    """OpenVINO's fp16 variant with static shapes, as on an NPU."""
    variant = Manifest.load(folder).variants["openvino-fp16"]
    return openvino.open(folder, variant, device, Options(options.threads, static_shapes=True))


def test_static_shapes_score_as_dynamic_ones(kind: str, bundle_of: Callable[[str], Path]) -> None:
    """Lengths below the first bucket, between two, and at the limit, not a power of two."""
    bundle = bundle_of(kind)
    with (
        Reranker(bundle, backend="openvino-fp16", compute_dtype="fp32") as dynamic,
        Reranker(bundle, backend=f"{__name__}:static") as fixed,
    ):
        ours, theirs = fixed.score(PAIRS * 3, raw=True), dynamic.score(PAIRS * 3, raw=True)
        assert fixed.engine._backend is not None
        lengths = sorted(fixed.engine._backend._models)  # type: ignore[attr-defined]
    assert lengths == [64, 128, tiny.MAX_LENGTH]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(np.ptp(theirs))))


def test_a_causal_model_on_static_shapes_reads_its_prefix_with_each_document(
    bundle_of: Callable[[str], Path],
) -> None:
    bundle = bundle_of("qwen3")
    with (
        Reranker(bundle, backend="openvino-fp16", compute_dtype="fp32") as dynamic,
        Reranker(bundle, backend=f"{__name__}:static") as fixed,
    ):
        ours, theirs = fixed.score(PAIRS, raw=True), dynamic.score(PAIRS, raw=True)
        assert fixed.engine._backend is not None
        lengths = set(fixed.engine._backend._models)  # type: ignore[attr-defined]
    assert len(lengths) > 2
    assert lengths <= {64, 128, 256, 512, 1024, 2048, tiny_decoders.MAX_LENGTH}
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(np.ptp(theirs))))


@pytest.mark.parametrize("device", ["gpu.7", "npu.7", "auto", "hetero:cpu"])
def test_an_absent_device_is_told_with_those_present(bundle: Path, device: str) -> None:
    with pytest.raises(TargetError, match=rf"no device '{device}'; present are: .*cpu"):
        Reranker(bundle, backend="openvino", device=device)


def test_arithmetic_is_chosen_and_named(bundle: Path) -> None:
    present = openvino.compute_dtypes("cpu")
    assert present[-1] == "fp32"
    with Reranker(bundle, backend="openvino-fp16", compute_dtype="fp32") as exact:
        logits = exact.engine.manifest.probes.logits
        assert exact.engine._backend is not None
        found = exact.engine._backend.logits(exact.engine.manifest.probes.work)
        fidelity = Fidelity.of(found, logits)
    assert fidelity.max_abs == pytest.approx(
        exact.target.variant.fidelity.max_abs, abs=1e-5 * fidelity.spread
    ), "a conversion is verified in fp32"
    for backend, compute_dtype in (("openvino", "int4"), ("onnx", "fp32")):
        with pytest.raises(TargetError, match=f"cannot compute in {compute_dtype} here"):
            Reranker(bundle, backend=backend, compute_dtype=compute_dtype)


def test_arithmetic_that_misses_the_probes_is_not_used(
    own_cache: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = openvino.open
    opened = []

    def wrong_in_bf16(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        opened.append(options.compute_dtype)
        if options.compute_dtype == "bf16":
            exact = Options(options.threads)
            return fakes._Shifted(real(folder, variant, device, exact))
        return real(folder, variant, device, options)

    monkeypatch.setattr(openvino.SPEC, "open", wrong_in_bf16)
    monkeypatch.setattr(openvino.SPEC, "compute_dtypes", lambda device: ("bf16", "fp32"))
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # run everything in this process
    caplog.set_level("INFO", "qrank")
    with Reranker(bundle, backend="openvino-int8") as reranker:
        found = reranker.score(PAIRS[:1], raw=True)
    with Reranker(bundle, backend="openvino-int8", compute_dtype="fp32") as exact:
        np.testing.assert_allclose(found, exact.score(PAIRS[:1], raw=True), rtol=0, atol=1e-6)
    assert opened == ["bf16", "fp32", "fp32"]
    assert "does not compute in bf16" in caplog.text
    # If requested explicitly, it fails and nothing else is tried.
    with pytest.raises(TargetError, match="computes wrongly"):
        Reranker(bundle, backend="openvino-int8", compute_dtype="bf16")
    assert opened[3:] == ["bf16"]


def test_numbers_that_fp16_cannot_hold_are_told(
    own_cache: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an NPU, which computes in nothing else."""
    real = openvino.open

    class Overflowing:
        def __init__(self, inner: Backend) -> None:
            self._inner = inner
            self.close = inner.close

        def logits(self, work: Sequences) -> Logits:
            found = self._inner.logits(work)
            found[0] = np.inf
            return found

    def overflowing(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        assert options.compute_dtype == "fp16"
        return Overflowing(real(folder, variant, device, replace(options, compute_dtype="fp32")))

    monkeypatch.setattr(openvino.SPEC, "open", overflowing)
    monkeypatch.setattr(openvino.SPEC, "compute_dtypes", lambda device: ("fp16",))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    told = r"\(1 of \d+ logits are infinite or no numbers: fp16 ends at 65,504"
    with pytest.raises(TargetError, match=told):
        Reranker(bundle, backend="openvino-fp16")


def test_bf16_is_as_good_of_fp16_as_of_int8_weights_where_it_ranks_as_well(
    own_cache: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 has the same error and tolerance for any weights; Kendall's tau is checked too."""
    real, spread = openvino.open, float(np.ptp(Manifest.load(bundle).probes.logits))
    shifts = {"bf16": 0.06 * max(1.0, spread)}

    class Shifted:
        def __init__(self, inner: Backend, by: float) -> None:
            self._inner, self._by = inner, by
            self.close = inner.close

        def logits(self, work: Sequences) -> Logits:
            return self._inner.logits(work) + np.float32(self._by)

    def shifted(folder: Path, variant: Variant, device: str, options: Options) -> Backend:
        by = shifts.get(options.compute_dtype or "", 0.0)
        return Shifted(real(folder, variant, device, replace(options, compute_dtype="fp32")), by)

    monkeypatch.setattr(openvino.SPEC, "open", shifted)
    monkeypatch.setattr(openvino.SPEC, "compute_dtypes", lambda device: ("bf16", "fp32"))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with Reranker(bundle, backend="openvino-fp16") as reranker:
        assert reranker.engine.compute_dtype == "bf16"
        assert 0.9 <= reranker.engine.kendall <= 1
    shifts["bf16"] = 0.08 * max(1.0, spread)
    with Reranker(bundle, backend="openvino-fp16", threads=1) as reranker:
        assert reranker.engine.compute_dtype == "fp32"


def test_x86_cpus_are_not_asked_to_compute_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8-w8a8 hangs in fp16, and CPUs with fp16 also have bf16, which is five times as fast."""

    class Core:
        available_devices = ("CPU", "GPU")

        def get_property(self, device: str, name: str) -> list[str]:
            return ["BF16", "FP16", "FP32", "INT8"]

    monkeypatch.setattr(openvino, "_core", Core)
    for name, expected in (("x86_64", ("bf16", "fp32")), ("aarch64", ("bf16", "fp16", "fp32"))):
        monkeypatch.setattr("platform.machine", lambda name=name: name)
        assert openvino.compute_dtypes("cpu") == expected
        assert openvino.compute_dtypes("gpu") == ("bf16", "fp16", "fp32")


def test_a_fused_feed_forward_part_gets_one_stream_of_two_threads(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO divides by half of a stream's threads there (SIGFPE); only AMX has such nodes."""
    manifest = Manifest.load(bundle)
    variant = manifest.variants["openvino-fp16"]
    monkeypatch.setattr(openvino, "has_fused_mlp", lambda model: True)
    # OpenVINO uses no more streams than the machine has cores.
    options = Options(2, compute_dtype="bf16")
    backend = openvino.open(bundle, variant, "cpu", options)
    assert backend._streams._max_workers == 1
    assert np.isfinite(backend.logits(manifest.probes.work)).all()
    backend.close()
    with pytest.raises(TargetError, match="takes two threads"):
        openvino.open(bundle, variant, "cpu", replace(options, threads=1))
    monkeypatch.undo()
    backend = openvino.open(bundle, variant, "cpu", options)
    assert backend._streams._max_workers == 2
    assert not has_fused_mlp(backend._model(None))
    backend.close()


def test_int8_activations_are_refused_where_their_products_overflow(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for sets, wrong in ((["AVX2"], True), (["AVX2", "AVX-VNNI"], False), ([], False)):
        monkeypatch.setattr(machine, "instruction_sets", lambda sets=sets: sets)
        assert openvino.saturates() == wrong
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(machine, "instruction_sets", lambda: ["NEON dot product"])
    assert not openvino.saturates()
    monkeypatch.setattr(openvino, "saturates", lambda: True)
    variant = Manifest.load(bundle).variants["openvino-int8"]
    with pytest.raises(TargetError, match=r"no VNNI.*take int8"):
        openvino.open(bundle, replace(variant, precision="int8-w8a8"), "cpu", Options(1))


SCORE = """
import sys
from qrank import Reranker
with Reranker(sys.argv[1], backend="openvino-int8") as reranker:
    print([float(x) for x in reranker.score([("which planet is red?", "mars")] * 9, raw=True)])
    print(reranker.engine._backend._model(None).get_property("LOADED_FROM_CACHE"))
assert sys.modules["openvino_telemetry"] is None
"""


def score(bundle: Path, folder: Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-B", "-c", SCORE, str(bundle.resolve())]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_compiled_graphs_are_kept_in_the_cache_folder(bundle: Path, tmp_path: Path) -> None:
    """And nowhere else: OpenVINO's telemetry would write to the home folder on import."""
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    first = score(bundle, home, HOME=home, QRANK_CACHE=cache)
    assert (first.returncode, first.stderr) == (0, "")
    assert list(home.iterdir()) == []
    # The process that checked the probes compiled it.
    logits, loaded = first.stdout.splitlines()
    assert loaded == "True"
    (blob,) = cache.glob("openvino/*/*.blob")
    assert [x.name for x in (cache / "openvino").iterdir()] == [blob.parent.name]
    assert score(bundle, home, HOME=home, QRANK_CACHE=cache).stdout == first.stdout
    # Truncated files, for example after a full disk, are made again.
    blob.chmod(0o644)
    os.truncate(blob, blob.stat().st_size // 2)
    third = score(bundle, home, HOME=home, QRANK_CACHE=cache)
    assert (third.returncode, third.stderr) == (0, "")
    assert third.stdout.splitlines() == [logits, "False"]


def test_processes_that_start_at_once_keep_one_compiled_graph(
    bundle: Path, own_cache: Path
) -> None:
    """None writes into a file that another one may have mapped."""
    core, options = need("openvino").Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    place = own_cache / "openvino" / "graph"

    class Slower:
        """A core during whose first work another one finishes."""

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            compile_or_load(core, graph(bundle, "int8"), options, place)
            return core.compile_model(model, device, settings)

    made = compile_or_load(Slower(), graph(bundle, "int8"), options, place)
    assert not made.get_property("LOADED_FROM_CACHE")
    (blob,) = place.iterdir()
    assert [x.name for x in place.parent.iterdir()] == [place.name]
    written = blob.stat()
    assert compile_or_load(core, graph(bundle, "int8"), options, place).get_property(
        "LOADED_FROM_CACHE"
    )
    assert blob.stat().st_mtime_ns == written.st_mtime_ns


def test_graphs_of_large_models_are_not_kept(
    bundle: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold the weights once more."""
    variant = Manifest.load(bundle).variants["openvino-int8"]
    weights = bundle / "openvino-int8" / "model.bin"
    monkeypatch.setattr(openvino, "LARGE", weights.stat().st_size)
    openvino.open(bundle, variant, "cpu", Options(1)).close()
    assert not list(own_cache.glob("openvino/*"))


def test_a_cpu_is_used_without_looking_for_other_devices(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would load their drivers, which may hang or crash."""

    def look(core: object) -> list[str]:
        raise AssertionError("the devices were listed")

    monkeypatch.setattr(need("openvino").Core, "available_devices", property(look))
    variant = Manifest.load(bundle).variants["openvino-int8"]
    assert openvino.compute_dtypes("cpu")
    openvino.open(bundle, variant, "cpu", Options(1)).close()


def test_works_where_nothing_can_be_kept(bundle: Path, tmp_path: Path) -> None:
    done = score(bundle, tmp_path, HOME="/dev/null/home", XDG_CACHE_HOME="", QRANK_CACHE="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("no cache: ")
    assert list(tmp_path.iterdir()) == []


def test_every_precision_holds_its_tolerance_in_what_users_get(bundle: Path) -> None:
    """Users get the fastest compute dtype; the manifest's fidelity is that of fp32."""
    manifest = Manifest.load(bundle)
    for precision in PRECISIONS:
        with Reranker(bundle, backend=f"openvino-{precision}") as reranker:
            assert reranker.engine._backend is not None
            found = reranker.engine._backend.logits(manifest.probes.work)
        fidelity = Fidelity.of(found, manifest.probes.logits)
        exact = reranker.engine.compute_dtype == "fp32"
        bar = tolerance("openvino", precision)
        assert (bar if exact else here(bar, exact=False)).shortfall(fidelity) is None


FORK = """
import os, sys, threading
from qrank import QrankError, Reranker

pairs = [("which planet is red?", "mars")] * 9
load = lambda: Reranker(sys.argv[1], backend="openvino")
reranker = load()
before = reranker.score(pairs)
other = threading.Thread(target=reranker.score, args=[pairs * 20])
other.start()
child = os.fork()
if child == 0:
    for attempt in (lambda: reranker.score(pairs), load):
        try:
            attempt()
        except QrankError as error:
            print(error, flush=True)
    reranker.close()
    # As web workers end: with destructors.
    sys.exit(7)
other.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert (reranker.score(pairs) == before).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_to_load_its_own(bundle: Path) -> None:
    """Otherwise it would occasionally hang while freeing a model."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(bundle)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines := done.stdout.splitlines()) == 2
    assert all("make the Reranker after the fork" in line for line in lines)


CLOSED = """
import signal, sys
from qrank import Reranker
from qrank.system.signal_stack import SignalStack

def stack():
    now = SignalStack()._now
    return now.start, now.size

before = stack()
first, second = (Reranker(sys.argv[1], backend="openvino-int8", threads=2) for _ in range(2))
first.close()
second.close()
assert stack() == before
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO replaces it on Linux alone")
@pytest.mark.parametrize("stack", [[], ["-X", "faulthandler"]], ids=["none", "faulthandler"])
def test_a_signal_is_handled_after_models_were_closed(bundle: Path, stack: list[str]) -> None:
    """It was a segmentation fault, unless the last one opened was closed first."""
    done = subprocess.run(
        [sys.executable, *stack, "-c", CLOSED, str(bundle)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_weights_that_a_graph_computes_get_one_stream(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Current bundles have no such weights, but one from an earlier version may have them."""
    manifest = Manifest.load(bundle)
    variant = manifest.variants["openvino-int8"]
    monkeypatch.setattr(openvino, "computed_weights", lambda model: ["head"])
    for threads in (1, 2):
        backend = openvino.open(bundle, variant, "cpu", Options(threads, compute_dtype="fp32"))
        assert backend._streams._max_workers == 1
        backend.close()
    monkeypatch.undo()
    backend = openvino.open(bundle, variant, "cpu", Options(2, compute_dtype="fp32"))
    assert backend._streams._max_workers == 2
    assert not computed_weights(backend._model(None))
    backend.close()
