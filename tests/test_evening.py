"""Evening out channels changes nothing but what quantization loses; and 4-bit matrices."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import tiny_decoders
import tiny_encoders
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from qrank.bundle.fidelity import Tolerance
from qrank.bundle.manifest import TOKENIZER
from qrank.bundle.sequences import Floats, Sequences
from qrank.converters import fidelity
from qrank.converters.checkpoint import evening
from qrank.converters.checkpoint.ids import encode_pairs
from qrank.converters.checkpoint.probes import calibration_pairs, probe_pairs
from qrank.converters.checkpoint.read import Checkpoint, read_checkpoint
from qrank.converters.checkpoint.reference import run_reference
from qrank.converters.convert import convert
from qrank.converters.four_bits import four_bits, group_of, packed
from qrank.system.extras import need

KINDS = list(tiny.CHECKPOINTS | tiny_decoders.CHECKPOINTS | tiny_encoders.CHECKPOINTS)
FAMILIES = tiny_decoders.FAMILIES | tiny_encoders.FAMILIES
UNEVEN = 16.0
VALUES = ("value.weight", "value.bias", "value_proj.weight", "v_lin.weight", "attn.v.weight")
NORMS = ("layernorm.weight", "attn_norm.weight", "mlp_norm.weight")
BEHIND = (
    *("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"),
    *("Wqkv.weight", "mlp.Wi.weight"),
)


def read(folder: Path, kind: str, target: Path) -> tuple[Checkpoint, Sequences, Sequences]:
    """A checkpoint, some of its probes, and pairs for calibration."""
    checkpoint = read_checkpoint(str(folder), family=FAMILIES.get(kind))
    path = target / TOKENIZER
    path.write_text(json.dumps(checkpoint.text_tokenizer()), "utf-8")
    pairs = (probe_pairs()[:8], calibration_pairs()[:8])
    probes, calibration = (encode_pairs(some, path, checkpoint.family) for some in pairs)
    return checkpoint, probes.whole(), calibration


def uneven(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with a few channels that are far larger than their neighbours.

    The values' weights and biases are larger in some rows. In models without such values, a norm's
    weights are larger and the columns of the products behind it smaller: they compute the same.
    """
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(VALUES):
            weight[::9] *= UNEVEN
        if name.endswith(NORMS):
            weight[::9] *= UNEVEN
        if name.endswith(BEHIND):
            weight[:, ::9] /= UNEVEN
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_evening_is_exact(
    kind: str, dtype: torch.dtype, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the last bit: factors are powers of two."""
    folder = uneven(checkpoint_of(kind), tmp_path / kind)
    checkpoint, probes, calibration = read(folder, kind, tmp_path)
    model = checkpoint.load().to(dtype)
    expected = run_reference(model, probes, checkpoint.family)
    found = evening.scalings(checkpoint, calibration)
    assert found, "no rules for this class"
    evening.even(model, found)
    exponents = {float(e) for s in found.values() for e in np.log2(s.rows)}
    assert len(exponents) > 1, "every channel stays as it is"
    assert all(e.is_integer() for e in exponents)
    # Gemma's norms are stored minus 1: near 0, a digit is lost.
    bound = 1e-5 if kind == "gemma" and dtype == torch.float32 else 0
    if kind != "gemma" or bound:
        after = run_reference(model, probes, checkpoint.family)
        np.testing.assert_allclose(after, expected, rtol=0, atol=bound * float(np.ptp(expected)))


def test_a_class_without_rules_stays_as_it_is(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evening, "_RULES", {})
    checkpoint, _, calibration = read(checkpoint_of("bert"), "bert", tmp_path)
    assert evening.scalings(checkpoint, Sequences([*calibration.ids, calibration.ids[0]])) == {}


def test_evening_brings_a_quantized_model_closer_to_the_original(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's q8_0 shares a scale among 32 activations, and so loses the small ones."""
    folder = uneven(checkpoint_of("qwen3"), tmp_path / "uneven")

    # Without evening, the conversion would be refused.
    monkeypatch.setattr(fidelity, "tolerance", lambda *name: Tolerance(np.inf))

    def error(target: Path) -> float:
        family = tiny_decoders.FAMILIES["qwen3"]
        manifest = convert(str(folder), [("gguf", "q8_0")], target, family=family).manifest
        return manifest.variants["gguf-q8_0"].fidelity.max_abs

    evened = error(tmp_path / "evened")
    monkeypatch.setattr(evening, "scalings", lambda checkpoint, calibration: {})
    assert evened < 0.5 * error(tmp_path / "plain")


def test_channels_that_carry_nothing_stay_as_they_are() -> None:
    x, w = np.array([4, 0, 1, 2], np.float32), np.array([1, 1, 0, 0.5], np.float32)
    assert [*evening.balance(x, w)] == [1, 1, 1, 1]
    x, w = np.array([64, 4], np.float32), np.ones(2, np.float32)
    assert [*evening.balance(x, w)] == [2, 0.5]
    assert [*evening.balance(0 * x, 0 * w)] == [1, 1]


# Four bits


MATRICES = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96, 128])),
    elements=st.floats(-100, 100, width=32),
)


def values_of(rows: Floats) -> tuple[Floats, Floats]:
    """A matrix after four_bits, and the scale of each of its numbers."""
    found = four_bits(rows)
    assert found is not None
    whole = (found.integers - found.zeros[..., None].astype(np.float32)) * found.scales[..., None]
    scales = np.broadcast_to(found.scales[..., None], whole.shape)
    return whole.reshape(rows.shape), scales.reshape(rows.shape)


@given(MATRICES)
def test_four_bits_are_as_close_as_the_best_range_allows(rows: Floats) -> None:
    """Never worse, in squares over a group, than half a step of the whole range."""
    found, _ = values_of(rows)
    group = group_of(rows.shape[1])
    assert group is not None
    groups = rows.reshape(-1, group)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    step = np.maximum((high - low) / 15, 2**-24)
    # A zero point that is rounded moves both ends of the range by up to half a step.
    bound = group * np.square(1.01 * step + 1e-6)
    assert (np.square(found.reshape(groups.shape) - groups).sum(1) <= bound).all()


def test_a_large_weight_is_cut_off_if_the_others_gain() -> None:
    rows = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    rows[:, 0] = 4.5
    _, scales = values_of(rows)
    whole = (np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)) / 15
    assert (scales[:, 0] < 0.99 * whole).any()


@pytest.mark.parametrize(
    ("width", "group"), [(1024, 64), (1056, 32), (576, 32), (32, 32), (48, None), (1000, None)]
)
def test_the_group_divides_the_width(width: int, group: int | None) -> None:
    assert group_of(width) == group
    assert (four_bits(np.ones((2, width), np.float32)) is None) == (group is None)


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15))
)
def test_packing_loses_nothing(integers: Any) -> None:
    found = packed(integers)
    both = np.stack([found & 15, found >> 4], -1).reshape(len(integers), -1)
    np.testing.assert_array_equal(both[:, : integers.shape[1]], integers)


def test_int4_graphs_hold_four_bits_but_for_the_words_and_what_is_summed(
    bundle_of: Callable[[str], Path],
) -> None:
    """In both formats by the same function; OpenVINO keeps matrices of up to 4,096 weights."""
    bundle = bundle_of("qwen3")
    graph = onnx.load(bundle / "onnx-int4" / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 5
    ends = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(ends) == 2 * 2, "those that add to the residual sum"
    weights = {i.name: i for i in graph.initializer}
    assert not [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert any(numpy_helper.to_array(i).dtype == np.int8 for i in graph.initializer)
    ov = need("openvino")
    nodes = ov.Core().read_model(bundle / "openvino-int4" / "model.xml").get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    four = [c for c in constants if c.get_element_type() == ov.Type.u4]
    assert len(four) == 2 * 2 * 3, "weights and zero points; keys and values are too small"
    assert {c.shape[-1] for c in four if c.shape[-1] > 1} == {32}
    assert [c for c in constants if c.get_element_type() == ov.Type.u8], "the words"
