"""Find the output matrix of a causal model's ONNX graph and read some of its rows.

Depending on how the graph was quantized, the matrix is plain, behind a DequantizeLinear, in a
MatMulInteger with dynamically quantized activations, or packed for MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Floats
from qrank.converters.prebuilt_graph import not_understood
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx


class Head:
    """The matrix product that computes the vocabulary's logits.

    Attributes:
        states: name of the hidden states that it multiplies, [batch, length, hidden].
    """

    def __init__(self, model: onnx.ModelProto, logits: str) -> None:
        """Find the product.

        Args:
            model: the graph with its weights.
            logits: name of the product's output.

        Raises:
            ConversionError: the logits do not come from a known kind of product.
        """
        self._onnx = need("onnx")
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._product = self._through(logits)
        self.states = self._states()

    def rows(self, labels: Sequence[int]) -> Floats:
        """Rows of the output matrix in fp32, shape [labels, hidden].

        Raises:
            ConversionError: the matrix is stored in an unknown way.
        """
        wanted, node = list(labels), self._product
        if node.op_type == "MatMulNBits":
            return self._packed(node, wanted)
        if node.op_type == "MatMul":
            return self._columns(node.input[1], wanted, 1).T
        # MatMulInteger, multiplied by the scales of the activations and the weights.
        integers = self._integers(node)
        zeros = self._array(integers.input[3]) if len(integers.input) > 3 else np.zeros(1)
        values = self._array(integers.input[1])[:, wanted].astype(np.float32)
        scale = self._array(self._scales(node)[1])
        values -= zeros if zeros.size == 1 else zeros[wanted]
        columns: Floats = values * (scale if scale.size == 1 else scale[wanted])
        return columns.T

    def _states(self) -> str:
        node = self._product
        if node.op_type in ("MatMul", "MatMulNBits"):
            return str(node.input[0])
        integers = self._integers(node)
        quantized = self._makers.get(integers.input[0])
        if quantized is None or quantized.op_type != "DynamicQuantizeLinear":
            raise self._strange(integers)
        return str(quantized.input[0])

    def _integers(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The MatMulInteger behind a Mul by scales."""
        for name in node.input if node.op_type == "Mul" else ():
            maker = self._through(name)
            if maker.op_type == "MatMulInteger":
                return maker
        raise self._strange(node)

    def _scales(self, node: onnx.NodeProto) -> list[str]:
        """Names of the activations' scale and the weights' scale."""
        (both,) = (n for n in node.input if self._through(n).op_type != "MatMulInteger")
        factors = self._makers[both]
        names = sorted(factors.input, key=lambda name: name in self._weights)
        if factors.op_type != "Mul" or names[1] not in self._weights:
            raise self._strange(factors)
        return names

    def _packed(self, node: onnx.NodeProto, labels: list[int]) -> Floats:
        """Rows of a MatMulNBits, stored in blocks with a scale and a zero point each."""
        attributes = {a.name: a.i for a in node.attribute}
        bits, block = attributes.get("bits", 4), attributes["block_size"]
        if bits not in (4, 8) or (len(node.input) > 4 and node.input[4]):
            raise self._strange(node)
        count, width = attributes["N"], attributes["K"]
        blocks = -(-width // block)
        integers = _unpacked(self._array(node.input[1]).reshape(count, -1)[labels], bits)
        scales = self._array(node.input[2]).reshape(count, blocks)[labels].astype(np.float32)
        zeros: NDArray[Any] = np.full((1, blocks), 1 << (bits - 1))
        if len(node.input) > 3 and node.input[3]:
            stored = self._array(node.input[3]).reshape(count, -1)[labels]
            whole = stored.dtype != np.uint8
            zeros = stored if whole else _unpacked(stored, bits)[:, :blocks]
        values = integers.reshape(len(labels), blocks, block) - zeros.astype(np.float32)[..., None]
        rows: Floats = (values * scales[..., None]).reshape(len(labels), -1)[:, :width]
        return rows

    def _columns(self, name: str, labels: list[int], axis: int) -> NDArray[Any]:
        """The labels' part of a matrix along one axis, in fp32."""
        if name in self._weights:
            return self._array(name).take(labels, axis).astype(np.float32)
        node = self._makers.get(name)
        if node is not None and node.op_type in ("Cast", "Identity"):
            return self._columns(node.input[0], labels, axis)
        if node is not None and node.op_type == "Transpose":
            return self._columns(node.input[0], labels, 1 - axis).T
        if node is not None and node.op_type == "DequantizeLinear":
            return self._dequantized(node, labels, axis)
        raise not_understood(f"a matrix of {node.op_type if node else name}")

    def _dequantized(self, node: onnx.NodeProto, labels: list[int], axis: int) -> NDArray[Any]:
        attributes = {a.name: a.i for a in node.attribute}
        if attributes.get("block_size"):
            raise self._strange(node)
        values = self._columns(node.input[0], labels, axis)
        along = attributes.get("axis", 1) % 2

        def fitting(name: str) -> Floats:
            numbers: Floats = self._array(name).astype(np.float32)
            if numbers.size == 1:
                return numbers
            numbers = numbers[labels] if along == axis else numbers
            return np.expand_dims(numbers, 1 - along)

        if len(node.input) > 2:
            values = values - fitting(node.input[2])
        made: NDArray[Any] = values * fitting(node.input[1])
        return made

    def _through(self, name: str) -> onnx.NodeProto:
        """The node that makes a value, skipping casts."""
        node = self._makers.get(name)
        while node is not None and node.op_type == "Cast":
            node = self._makers.get(node.input[0])
        if node is None:
            raise not_understood(name)
        return node

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._weights:
            raise not_understood(f"a matrix that {name} is part of")
        array: NDArray[Any] = self._onnx.numpy_helper.to_array(self._weights[name])
        return array

    def _strange(self, node: onnx.NodeProto) -> Exception:
        return not_understood(f"{node.op_type} {node.name}")


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[Any]:
    """Unpack numbers of 4 bits, the lower half of a byte first, or of 8 bits."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
