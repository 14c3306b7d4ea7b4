"""MLX: what Metal does otherwise than the CPU, the file, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import test_sliding_windows as windows
import tiny
import tiny_decoders
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_conformance import ALONE, PAIRS, conforms, reference
from transformers import (
    AutoModelForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from qrank import Reranker
from qrank.backends import Options, tolerance
from qrank.backends import mlx as backend
from qrank.backends.isolation import limit
from qrank.backends.mlx_encoder import Encoder
from qrank.bundle.fidelity import Fidelity, here
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Floats, Logits, Sequences
from qrank.converters import makers
from qrank.converters.checkpoint import evening
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.checkpoint.reference import run_reference
from qrank.converters.convert import convert
from qrank.converters.mlx import export
from qrank.converters.mlx.layouts import Layout
from qrank.converters.mlx.quantize import group, quantized
from qrank.errors import ConversionError, TargetError
from qrank.scoring.pair_tokenizer import PairTokenizer

LAYER = ("qkv", "out", "up", "down")
FAMILIES = ["bert", "modernbert-mean", "qwen3"]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that claims to be Metal: everything but MLX's kernels is Metal's."""
    monkeypatch.setitem(backend.DEVICES, "metal", "cpu")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_opened_in", [])


@pytest.fixture
def made(
    made_once: Callable[..., Path],
    bundle_of: Callable[[str], Path],
    checkpoint_of: Callable[[str], Path],
) -> Callable[[str], Path]:
    """Return a bundle of a kind of checkpoint with every precision, an encoder's int4 too."""

    def get(kind: str) -> Path:
        if kind not in tiny.CHECKPOINTS:
            return bundle_of(kind)

        def make(folder: Path) -> None:
            precisions = [("mlx", name) for name in ("int8", "int4", "fp16")]
            source, target = str(checkpoint_of(kind)), folder / "tiny-qrank"
            # Random weights in 4 bits change an order more than trained ones.
            assert not convert(source, precisions, target, min_agreement=0.8).failed

        return made_once(f"{kind}-mlx", make) / "tiny-qrank"

    return get


def opened(bundle: Path, precision: str, device: str, **options: Any) -> backend.MlxBackend:
    variant = Manifest.load(bundle).variants[f"mlx-{precision}"]
    return backend.open(bundle, variant, device, Options(2, **options))


def logits(bundle: Path, precision: str, device: str, **options: Any) -> Logits:
    """Of the bundle's probes, in batches."""
    found = opened(bundle, precision, device, **options)
    try:
        return found.logits(Manifest.load(bundle).probes.work)
    finally:
        found.close()


@pytest.mark.parametrize("kind", [kind for kind in tiny.CHECKPOINTS if kind != "bert"])
def test_conformance_of_encoders_in_4_bits(
    kind: str, made: Callable[[str], Path], checkpoint_of: Callable[[str], Path]
) -> None:
    """But BERT with two token types: 4 bits reorder random weights; `mini`'s keep a tau of 0.96."""
    theirs, _ = reference(checkpoint_of(kind))
    # On a CPU, MLX expands 4 bits again for every product.
    conforms(made(kind), "mlx-int4", PAIRS, theirs, ALONE, 4)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert-mean", "modernbert-cls"])
def test_encoders_compute_in_4_bits_what_transformers_does_with_the_same_weights(
    kind: str, made: Callable[[str], Path], checkpoint_of: Callable[[str], Path]
) -> None:
    """The conversion proves that they are close to the original; this, that the graph is exact."""
    manifest = Manifest.load(made(kind))
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint_of(kind)).eval()
    parameters = dict(model.named_parameters())
    layout = Layout.of(manifest.family.architecture)
    with safe_open(made(kind) / "mlx-int4" / "model.safetensors", "np") as file:
        quantized = json.loads(file.metadata()["qrank"])["quantized"]
        for module, theirs in layout.places(model.config.num_hidden_layers):
            for end in ("weight", "bias"):
                if (names := [f"{name}.{end}" for name in theirs])[0] not in parameters:
                    continue
                values = file.get_tensor(f"{module}.{end}")
                if end == "weight" and module in quantized:
                    values = expanded(file, module, *quantized[module])
                for name in names:
                    # XLM-RoBERTa's first positions belong to no token.
                    rows = min(len(parameters[name]), len(values))
                    parameters[name].data[-rows:] = torch.from_numpy(values[:rows]).float()
                    values = values[rows:]
                assert len(values) == 0
    expected = run_reference(model, manifest.probes.work, manifest.family)
    np.testing.assert_allclose(logits(made(kind), "int4", "cpu"), expected, atol=1e-3)


def expanded(file: Any, module: str, bits: int, size: int) -> Floats:
    """A quantized matrix as numbers: integer * scale + bias."""
    words, scales, biases = (
        file.get_tensor(f"{module}.{kind}") for kind in ("weight", "scales", "biases")
    )
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    groups = integers.reshape(*scales.shape, size).astype(np.float32)
    found = groups * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return np.asarray(found.reshape(len(words), -1))


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_decoder_sees_its_window_beyond_the_probes(kind: str, tmp_path: Path) -> None:
    """Behind a prefix too; Qwen3 with positions whose cosine has a factor."""
    folder, family = tmp_path / "model", windows.LLAMA
    if kind == "qwen3":
        family = "qwen3-reranker"
        scaled = {**windows.ROPES["longrope"], "original_max_position_embeddings": windows.LENGTH}
        windows.qwen3(folder, **windows.MIXED, rope_parameters=scaled)
    else:
        config = MistralConfig(**windows.SIZES, sliding_window=windows.WINDOW)
        tiny_decoders.save(folder, MistralForCausalLM, config)
    path = folder / "model.safetensors"
    exact = {name: x.astype(np.float16).astype(np.float32) for name, x in load_file(path).items()}
    save_file(exact, path, {"format": "pt"})
    checkpoint = read_checkpoint(str(folder), family=family)
    tokenizer = PairTokenizer(json.dumps(checkpoint.text_tokenizer()), checkpoint.family)
    ids = [tokenizer.whole(query, document)[0] for query, document in windows.PAIRS]
    variant = Variant("mlx", "fp16", {}, Fidelity(0, 0, 1, 1), {})
    (tmp_path / variant.name).mkdir()
    export.convert(checkpoint, "fp16", tmp_path / variant.name, Sequences([]))
    found = backend.open(tmp_path, variant, "cpu", Options(2))
    expected = windows.reference(folder, family)
    np.testing.assert_allclose(found.logits(Sequences(ids)), expected, atol=1e-3)
    before = next(i for i, some in enumerate(zip(*ids, strict=False)) if len(set(some)) > 1)
    assert before > 2
    behind = Sequences([each[before:] for each in ids], None, ids[0][:before])
    np.testing.assert_allclose(found.logits(behind), expected, atol=1e-3)
    found.close()


# Metal's way


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_products_of_quantized_weights_are_those_of_expanded_ones(
    kind: str, precision: str, metal: None, made: Callable[[str], Path]
) -> None:
    """On Metal, MLX multiplies with the integers; on the CPU, with what they stand for."""
    apart = logits(made(kind), precision, "cpu")
    fused = logits(made(kind), precision, "metal", compute_dtype="fp32")
    np.testing.assert_allclose(fused, apart, atol=1e-4 * max(1.0, float(np.ptp(apart))))


@pytest.mark.parametrize("kind", FAMILIES)
def test_16_bits_are_as_close_as_a_proof_asks_for(
    kind: str, metal: None, made: Callable[[str], Path]
) -> None:
    """With weights in 16 bits: on a CPU, MLX takes minutes for quantized ones in fp16."""
    theirs = Manifest.load(made(kind)).probes.logits
    assert backend.compute_dtypes("metal") == ("fp16", "bf16", "fp32")
    found = {}
    for dtype in ("fp16", "bf16"):
        found[dtype] = logits(made(kind), "fp16", "metal", compute_dtype=dtype)
        assert found[dtype].dtype == np.float32
    for dtype, ours in found.items():
        bar = here(tolerance("mlx", "fp16"), exact=False)
        assert bar.shortfall(Fidelity.of(ours, theirs)) is None, dtype
    assert np.abs(found["fp16"] - found["bf16"]).max() > 0


def test_metals_memory_is_what_it_recommends(metal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.memory("metal") is None, "this is no Metal, which would say"
    told = {"max_recommended_working_set_size": 12_713_115_648}
    monkeypatch.setattr(mx, "device_info", lambda device: told)
    assert backend.memory("metal") == 12_713_115_648
    assert backend.memory("cpu") is None


def test_a_forked_process_is_refused(
    metal: None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(bundle, "int8", "metal").close()
    opened(bundle, "int8", "metal").close()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(TargetError, match="make the Reranker after the fork"):
        opened(bundle, "int8", "metal")


def test_where_memory_does_not_suffice_smaller_batches_give_the_same(
    metal: None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(bundle, "int8", "metal")
    compute = Encoder.__call__
    tried: list[int] = []

    def limited(self: Encoder, ids: Any, *rest: Any) -> Any:
        tried.append(ids.size)
        if ids.size > 1000:
            raise RuntimeError(
                "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum "
                "allowed buffer size of 8 bytes."
            )
        return compute(self, ids, *rest)

    monkeypatch.setattr(Encoder, "__call__", limited)
    found = logits(bundle, "int8", "metal")
    assert max(tried) > 1000
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are told otherwise")
def test_models_share_mlxs_threads(bundle: Path) -> None:
    """MLX never ends the thread of a stream."""
    counts = []
    for _ in range(6):
        logits(bundle, "int8", "cpu")
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    assert counts[-1] <= counts[0] + 1, "two threads have two streams, whoever opened them"


# The file


@given(st.sampled_from([32, 64, 96, 1024]), st.sampled_from([8, 4]), st.integers(0, 2**32 - 1))
def test_mlx_reads_what_is_written(width: int, bits: int, seed: int) -> None:
    """Every weight is at most half a step off, and those of one group share a step."""
    chance = np.random.default_rng(seed)
    rows = chance.standard_normal((3, width)) * 10.0 ** chance.uniform(-4, 2, (3, 1))
    rows[0] = rows[0, 0]
    rows[1, ::2] = 0
    pieces = [rows[:2].astype(np.float32), rows[2:].astype(np.float32)]
    found = {name: mx.array(values) for name, values in quantized(pieces, bits).items()}
    size = group(width, bits)
    assert size is not None
    with mx.stream(mx.cpu):
        scales, biases = (found[name].astype(mx.float32) for name in ("scales", "biases"))
        wide = mx.dequantize(found["weight"], scales, biases, group_size=size, bits=bits)
        back = np.array(wide)
    steps = np.repeat(np.array(found["scales"], np.float32), size, axis=1)
    off = np.abs(back - rows)
    # A bias is rounded to fp16. In 4 bits, the end of a range may be cut, and 15 steps add up what
    # fp16's least number leaves of a step.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    least = 2.0**-24 if bits == 8 else 15 * 2.0**-24
    near = off <= 0.5 * steps + largest * 2.0**-10 + least
    if bits == 8:
        assert near.all()
        assert (back[rows == 0] == 0).all(), "an offset would add up over a row"
    else:
        assert near.mean() > 0.9
        assert (off <= 0.5 * largest + 2.0**-24).all()


def test_the_file_has_16_bits_where_8_are_too_few(made: Callable[[str], Path]) -> None:
    path = made("bert") / "mlx-int4" / "model.safetensors"
    stored = load_file(path)
    assert {name for name in stored if stored[name].dtype == np.uint32} == {
        f"{module}.weight"
        for module in ("words", *(f"layers.{i}.{m}" for i in (0, 1) for m in LAYER))
    }
    kinds = {name: stored[name].dtype for name in stored if not name.endswith(("scales", "biases"))}
    assert kinds["positions.weight"] == kinds["types.weight"] == np.float16
    assert {kinds[name] for name in kinds if name.startswith("head.")} == {np.dtype(np.float32)}
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["qrank"])
    assert about["quantized"]["words"] == [8, 64]
    assert about["quantized"]["layers.1.qkv"] == [4, 32]
    assert about["quantized"]["layers.1.down"] == [8, 64]


def test_rows_that_fit_no_group_keep_16_bits(tmp_path: Path) -> None:
    folder = tiny.CHECKPOINTS["bert"](tmp_path / "tiny")
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if "layer.0.intermediate.dense" in name or "layer.1.intermediate.dense" in name:
            weights[name] = weights[name][:100]
        elif name.endswith(("layer.0.output.dense.weight", "layer.1.output.dense.weight")):
            weights[name] = np.ascontiguousarray(weights[name][:, :100])
    save_file(weights, path, {"format": "pt"})
    tiny.edit_config(folder, intermediate_size=100)
    made = convert(str(folder), [("mlx", "int8")], tmp_path / "bundle")
    variant = made.manifest.variants["mlx-int8"]
    assert variant.note == "rows of 100 do not fit 32: 2 of 9 matrices stay fp16"


@pytest.mark.parametrize("damage", ["cut", "empty", "another", "lacking"])
def test_a_damaged_file_is_told(bundle: Path, tmp_path: Path, damage: str) -> None:
    variant = Manifest.load(bundle).variants["mlx-int8"]
    folder = Path(shutil.copytree(bundle / variant.name, tmp_path / variant.name))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another":
        save_file({"a": np.zeros(1, np.float32)}, path)
    else:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        del tensors["layers.1.out.weight"]
        save_file(tensors, path, metadata)
    probes = Manifest.load(bundle).probes.work.take(np.arange(3))
    with pytest.raises(TargetError, match=r"mlx (cannot load .*model\.safetensors|failed) on cpu"):
        backend.open(tmp_path, variant, "cpu", Options(1)).logits(probes)


def test_numbers_beyond_a_table_are_an_error(bundle: Path) -> None:
    """MLX would read beyond it."""
    found = opened(bundle, "int8", "cpu")
    for number in (1200, 1_000_000, -1):
        bad = Sequences([np.array([2, number, 3], np.int32)], [np.zeros(3, np.int8)])
        with pytest.raises(TargetError, match=f"number {number} of the model's words"):
            found.logits(bad)
    long = Sequences([np.full(161, 5, np.int32)], [np.zeros(161, np.int8)])
    with pytest.raises(TargetError, match="number 160 of the model's positions; it has 160"):
        found.logits(long)
    types = Sequences([np.array([2, 3], np.int32)], [np.array([0, 2], np.int8)])
    with pytest.raises(TargetError, match="number 2 of the model's types"):
        found.logits(types)
    found.close()


# What is refused, and what is made


def test_slow_products_on_a_cpu_are_no_hang() -> None:
    """Proving `mini` on 2 cores took minutes."""
    size, tokens = 25_000_000, 19_000
    assert limit("mlx", size, tokens, "cpu") > 10 * 60
    assert limit("mlx", size, tokens, "metal") < limit("mlx", size, tokens, "cpu")


def test_an_absent_device_is_told(bundle: Path) -> None:
    if "metal" not in backend.devices():
        with pytest.raises(TargetError, match="no device 'metal'; present are: cpu"):
            Reranker(bundle, backend="mlx-int8", device="metal")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'.*MLX graphs compute: gelu"),
        ({"architectures": ["MPNetForSequenceClassification"]}, "no MLX graph of MPNetFor"),
    ],
)
def test_what_the_graphs_do_not_compute_is_refused_before_anything_is(
    change: dict[str, Any],
    reason: str,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "bert"))
    checkpoint = read_checkpoint(str(folder))
    if named := change.get("architectures"):
        family = replace(checkpoint.family, architecture=named[0])
        checkpoint = replace(checkpoint, family=family)
    else:
        tiny.edit_config(folder, **change)
    monkeypatch.setattr(evening, "scalings", partial(pytest.fail, "it was measured"))
    with pytest.raises(ConversionError, match=reason):
        export.convert(checkpoint, "int8", tmp_path, Sequences([]))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_family_without_a_graph_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="models of family mpnet cannot be run as mlx"):
        convert(str(checkpoint_of("mpnet")), [("mlx", "int8")], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("apple", [False, True])
def test_only_a_mac_makes_it_unasked(apple: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    format = backend.SPEC.format
    assert format is not None
    monkeypatch.setattr(backend.SPEC, "format", replace(format, unasked=apple))
    monkeypatch.setattr(makers, "installed", lambda module: True)
    made, _ = makers.of_checkpoint(None)
    assert (("mlx", "int8") in made) is apple
    named, _ = makers.of_checkpoint([("mlx", None)])
    assert list(named) == [("mlx", "int8")]
