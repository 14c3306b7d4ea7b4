"""Nodes of OpenVINO graphs that its CPU plugin treats in a way of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

_WIDE = 64
"""Constants with fewer rows or columns are no weights of a feed-forward block."""

_NOT_IN_PLACE = ("Const", "Convert", "Reorder")
"""Layer types of constant nodes that compute nothing in place."""


def keep_halves(model: openvino.Model) -> None:
    """Have 16-bit weights kept as they are until they are packed, for products in bf16.

    The plugin makes fp32 of them when it compiles, and keeps that beside what it packs (2026.4),
    unless their Convert is marked as a decompression: 3.4 GB instead of 1.2 for 0.6 billion
    parameters, with the same logits.
    """
    for node in model.get_ops():
        if node.get_type_name() != "Convert":
            continue
        source = node.input_value(0).get_node()
        kind = source.get_element_type().get_type_name()
        if source.get_type_name() == "Constant" and kind in ("f16", "bf16"):
            # The value is not read.
            node.get_rt_info()["decompression_0"] = ""


def computed_weights(model: openvino.CompiledModel) -> list[str]:
    """Nodes that a CPU graph computes in place from constants only: a head's scaled weights.

    Streams share the result, but each computes it (2026.4): in one of a hundred models, a stream
    started over after another had finished, and every logit was wrong, by 1,300. A one-row matrix
    stored in 8 bits becomes such a node; most others are multiplied as stored.
    """
    constant: set[str] = set()
    found = []
    for node in model.get_runtime_model().get_ordered_ops():
        sources = [value.get_node().friendly_name for value in node.input_values()]
        layer = _layer(node)
        if layer == "Const" or (sources and constant.issuperset(sources)):
            constant.add(node.friendly_name)
            if layer not in _NOT_IN_PLACE:
                found.append(node.friendly_name)
    return found


def has_fused_mlp(model: openvino.CompiledModel) -> bool:
    """Whether a gated feed-forward block was fused, as for 16-bit weights in bf16 on AMX.

    The fused node (LLMMLP, 2026.4) divides by half of a stream's threads, rounded down: a stream
    with one thread crashes.
    """
    return any(_layer(node) == "LLMMLP" for node in model.get_runtime_model().get_ops())


def may_fuse_mlp(model: openvino.Model) -> bool:
    """Whether a causal model's feed-forward blocks may be fused in bf16, before it is compiled.

    Compiling it for streams of one thread can crash already. Matrices with a zero point are not
    fused, and neither are products in int8.
    """
    types = set()
    for node in model.get_ops():
        if node.get_type_name() == "FakeQuantize":
            return False
        if node.get_type_name() == "Constant" and min(_matrix(node), default=0) >= _WIDE:
            types.add(node.get_element_type().get_type_name())
    return not types.isdisjoint(("f16", "bf16", "f32", "i8"))


def _matrix(node: openvino.Node) -> list[int]:
    """A constant's dimensions if it has two."""
    shape = list(node.output(0).shape)
    return shape if len(shape) == 2 else []


def _layer(node: openvino.Node) -> str:
    """The layer type of a compiled graph's node in OpenVINO's CPU plugin."""
    return str(node.get_rt_info()["layerType"].astype(str))
