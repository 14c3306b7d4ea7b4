"""Shrink the weights of an OpenVINO graph one by one, as they are read from disk.

NNCF holds a whole model in fp32 before it compresses it: 16 GB for 4 billion parameters. Here each
weight is read, quantized and released, into the same nodes that NNCF makes: int8 with a scale and a
zero point per row, int4 with a scale and a zero point per group of a row's weights. In int8-w8a8
products are computed in int8: see `_Tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Floats
from qrank.converters.four_bits import four_bits, packed
from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

_LARGE = 2**12
"""Minimum number of elements to shrink: smaller constants are not weights."""

_LEAST = 1e-6
"""Lower bound for a token's divisor: one of nothing but zeros stays as it is."""


def shrink(graph: openvino.Model, precision: str, *, keep: set[str]) -> None:
    """Convert every matrix and embedding table of a graph read from ONNX to a precision.

    Args:
        graph: changed in place.
        precision: `fp16`, `int8`, `int8-w8a8` or `int4`. In `int4`, embedding tables and the
            products that add to the residual sum are int8: 4 bits there cost the most. In
            `int8-w8a8`, embedding tables are as in `int8`.
        keep: names of nodes to leave unchanged: the score head's.
    """
    ov = need("openvino")
    table = _half if precision == "fp16" else _int8
    matrix = _int4 if precision == "int4" else table
    # Several nodes may use one table, which is shrunk once.
    made: dict[str, Any] = {}
    tokens = _Tokens() if precision == "int8-w8a8" else None
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
            if name not in made:
                made[name] = table(rows) if tokens is None else _levels(rows)
            if tokens is None:
                node.input(0).replace_source_output(made[name].output(0))
            else:
                _replace(node, _looked_up(made[name], node))
        else:
            # Use one row per output: what the graph transposes is already stored like that.
            turned ^= node.get_attributes()["transpose_b"]
            rows = rows if turned else np.ascontiguousarray(rows.T)
            given = node.input(0).get_source_output()
            if tokens is not None:
                product = tokens.product(given, rows)
            else:
                make = table if _is_summed(node) else matrix
                product = ov.opset13.matmul(given, make(rows), False, True)
            _replace(node, product)


def _replace(node: Any, by: Any) -> None:
    """Give a node's name and users to another."""
    by.set_friendly_name(node.get_friendly_name())
    for user in node.output(0).get_target_inputs():
        user.replace_source_output(by.output(0))


def _constant(node: Any) -> tuple[Any, bool]:
    """The constant that a weight comes from (or None), and whether it is transposed on the way."""
    turned = False
    while node.get_type_name() in ("Transpose", "Convert"):
        turned ^= node.get_type_name() == "Transpose"
        node = node.input(0).get_source_output().get_node()
    return (node if node.get_type_name() == "Constant" else None), turned


def _is_summed(node: Any) -> bool:
    """Whether a product's output, with its bias, is added to other activations."""
    for user in (target.get_node() for target in node.output(0).get_target_inputs()):
        if user.get_type_name() == "Add":
            sources = [i.get_source_output().get_node() for i in user.inputs()]
            if all(_constant(source)[0] is None for source in sources) or _is_summed(user):
                return True
    return False


class _Tokens:
    """Products of activations and weights in int8, with a scale for each token.

    A token is divided by its largest absolute value, the quotients are rounded to 127 steps on both
    sides of 0, and the product is multiplied by what was divided. So no range is calibrated, and a
    token's result does not depend on its neighbours. OpenVINO's CPU plugin computes in int8 what is
    between a FakeQuantize and a signed constant with one scale per row.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], tuple[Any, Any]] = {}

    def product(self, given: Any, rows: Floats) -> Any:
        """The product of `given` [..., inputs] and `rows` [outputs, inputs], transposed."""
        opset = need("openvino").opset13
        rounded, scale = self._rounded(given)
        return opset.multiply(opset.matmul(rounded, _signed(rows), False, True), scale)

    def _rounded(self, given: Any) -> tuple[Any, Any]:
        """The quotients, rounded, and each token's divisor; made once for all products of it."""
        key = (given.get_node().get_friendly_name(), given.get_index())
        if key not in self._made:
            opset = need("openvino").opset13
            largest = opset.reduce_max(opset.absolute(given), np.array([-1]), keep_dims=True)
            # 128 steps below 0 and 127 above, so that the largest is 127 steps from 0.
            scale = opset.maximum(
                opset.multiply(largest, np.float32(128 / 127)), np.float32(_LEAST)
            )
            low, high = np.float32(-1), np.float32(127 / 128)
            quotients = opset.divide(given, scale)
            self._made[key] = (
                opset.fake_quantize(quotients, low, high, low, high, 256),
                scale,
            )
        return self._made[key]


def _signed(rows: Floats) -> Any:
    """rows -> int8 * scale, with a scale per row."""
    opset = need("openvino").opset13
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.float32(2**-24))
    integers = np.clip(np.rint(rows / scale), -127, 127).astype(np.int8)
    return opset.multiply(opset.convert(opset.constant(integers), "f32"), opset.constant(scale))


def _half(rows: Floats) -> Any:
    opset = need("openvino").opset13
    # Values may be too small or too large for fp16: the probes decide whether that matters.
    with np.errstate(all="ignore"):
        return opset.convert(opset.constant(rows.astype(np.float16)), "f32")


def _int8(rows: Floats) -> Any:
    """rows -> (uint8 - zero point) * scale, with a zero point and a scale per row."""
    opset = need("openvino").opset13
    integers, zeros, scales = _levels(rows)
    shifted = opset.subtract(opset.convert(integers, "f16"), opset.convert(zeros, "f16"))
    return opset.convert(opset.multiply(shifted, scales), "f32")


def _levels(rows: Floats) -> tuple[Any, Any, Any]:
    """Constants: rows as uint8, and each row's zero point, in uint8, and scale, in fp16."""
    opset = need("openvino").opset13
    low = np.minimum(rows.min(axis=1, keepdims=True), 0)
    scale = (np.maximum(rows.max(axis=1, keepdims=True), 0) - low) / 255
    # Round the scale to fp16 as it will be used; that of tiny weights may be below fp16's range.
    scale = np.maximum(scale.astype(np.float16), np.float16(2**-24)).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    rows = rows / scale
    rows += zero
    np.clip(np.rint(rows, out=rows), 0, 255, out=rows)
    return (
        opset.constant(rows.astype(np.uint8)),
        opset.constant(zero.astype(np.uint8)),
        opset.constant(scale.astype(np.float16)),
    )


def _looked_up(table: tuple[Any, Any, Any], gather: Any) -> Any:
    """What a Gather reads from a table's levels, as fp32.

    The rows are made of their levels after they are read: beside products in int8, OpenVINO's CPU
    plugin would otherwise make fp32 of a whole table when it compiles (2026.4).
    """
    opset = need("openvino").opset13
    ids, axis = (gather.input(place).get_source_output() for place in (1, 2))
    integers, zeros, scales = (
        opset.convert(opset.gather(part, ids, axis), "f32") for part in table
    )
    return opset.multiply(opset.subtract(integers, zeros), scales)


def _int4(rows: Floats) -> Any:
    """rows -> (uint4 - zero point) * scale, per group; int8 if the rows do not fit any group."""
    ov = need("openvino")
    opset = ov.opset13
    found = four_bits(rows)
    if found is None:
        return _int8(rows)

    def uint4(values: NDArray[np.uint8]) -> Any:
        # Filled here: a constant would share the memory of a given array without keeping it.
        tensor = ov.Tensor(ov.Type.u4, ov.Shape(values.shape))
        tensor.data[:] = packed(values.reshape(1, -1)).reshape(tensor.data.shape)
        return opset.convert(opset.constant(tensor), "f16")

    shifted = opset.subtract(uint4(found.integers), uint4(found.zeros[..., None]))
    scales = opset.constant(found.scales[..., None].astype(np.float16))
    whole = opset.reshape(
        opset.multiply(shifted, scales), np.array(rows.shape, np.int64), special_zero=False
    )
    return opset.convert(whole, "f32")
