"""Nodes of a compiled OpenVINO CPU graph that only run safely in one stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

_NOT_IN_PLACE = ("Const", "Convert", "Reorder")
"""What a compiled graph makes of constants elsewhere than where they are."""


def computed_weights(model: openvino.CompiledModel) -> list[str]:
    """Nodes that a CPU's graph computes of constants alone, in place: scaled weights of a head.

    Streams share the result and compute it each for itself (2026.4): once in a hundred models one
    began anew when another was done, and every score was wrong, by 1,300 logits. A matrix of one
    row that is stored in 8 bits becomes such a node; most others are multiplied as they are.
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
    """Whether a gated feed-forward part became one node, as in bf16 of 16-bit weights on AMX.

    It divides by half a stream's threads (node LLMMLP, 2026.4): streams of one thread die of it.
    """
    return any(_layer(node) == "LLMMLP" for node in model.get_runtime_model().get_ops())


def _layer(node: openvino.Node) -> str:
    """What a compiled graph's node is to OpenVINO's CPU."""
    return str(node.get_rt_info()["layerType"].astype(str))
