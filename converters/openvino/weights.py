"""Weights in OpenVINO's graph: shrunk one by one, as they come off the disk.

NNCF holds a whole model in fp32 before it compresses it, 16 GB of 4 billion parameters. Here each
weight is read, quantized and let go, into the very nodes that NNCF makes: int8 with a scale and a
zero point a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

_LARGE = 2**12
"""Numbers from which something is worth shrinking: less is no weight."""

Floats = NDArray[np.float32]


def shrink(graph: openvino.Model, precision: str, *, keep: set[str]) -> None:
    """Put every matrix and embedding table of a graph, as ONNX gives it, into a precision.

    Args:
        graph: changed in place.
        precision: `int8` or `fp16`.
        keep: names of nodes to leave as they are: the score head's.
    """
    ov = need("openvino")
    make = _half if precision == "fp16" else _int8
    # One table may serve several nodes, and is shrunk once.
    made: dict[str, Any] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Gather") or node.get_friendly_name() in keep:
            continue
        place = 1 if node.get_type_name() == "MatMul" else 0
        constant, turned = _constant(node.input(place).get_source_output().get_node())
        if constant is None or len(constant.output(0).shape) != 2:
            continue
        rows = constant.get_data(dtype=np.float32)
        if rows.size < _LARGE:
            continue
        name = constant.get_friendly_name()
        if place == 0:
            made[name] = made[name] if name in made else make(rows)
            node.input(0).replace_source_output(made[name].output(0))
        else:
            # A row an output: what the graph turns is so on the disk.
            turned ^= node.get_attributes()["transpose_b"]
            weights = make(rows if turned else np.ascontiguousarray(rows.T))
            product = ov.opset13.matmul(node.input(0).get_source_output(), weights, False, True)
            product.set_friendly_name(node.get_friendly_name())
            for user in node.output(0).get_target_inputs():
                user.replace_source_output(product.output(0))


def _constant(node: Any) -> tuple[Any, bool]:
    """The constant that a weight comes from, and whether it is turned on the way; or None."""
    turned = False
    while node.get_type_name() in ("Transpose", "Convert"):
        turned ^= node.get_type_name() == "Transpose"
        node = node.input(0).get_source_output().get_node()
    return (node if node.get_type_name() == "Constant" else None), turned


def _half(rows: Floats) -> Any:
    opset = need("openvino").opset13
    # What is too small or too large for fp16: the probes decide whether that matters.
    with np.errstate(all="ignore"):
        return opset.convert(opset.constant(rows.astype(np.float16)), "f32")


def _int8(rows: Floats) -> Any:
    """rows -> (uint8 - zero point) * scale, both of a row's own."""
    opset = need("openvino").opset13
    low = np.minimum(rows.min(axis=1, keepdims=True), 0)
    scale = (np.maximum(rows.max(axis=1, keepdims=True), 0) - low) / 255
    # As it will be multiplied by: fp16, which a row of tiny weights may be below.
    scale = np.maximum(scale.astype(np.float16), np.float16(2**-24)).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    rows = rows / scale
    rows += zero
    np.clip(np.rint(rows, out=rows), 0, 255, out=rows)
    integers = opset.convert(opset.constant(rows.astype(np.uint8)), "f16")
    zeros = opset.convert(opset.constant(zero.astype(np.uint8)), "f16")
    shifted = opset.subtract(integers, zeros)
    return opset.convert(opset.multiply(shifted, opset.constant(scale.astype(np.float16))), "f32")
