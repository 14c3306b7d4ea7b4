"""int8 for ONNX graphs: one scale per weight column and per token, so scores ignore the batch.

onnxruntime's own dynamic quantization uses one activation scale for a whole padded batch, so a
pair's score depends on the other pairs, and one large value makes all others coarser. Here

1. every token (row of the activations) gets its own scale, so that the batch has no influence;
2. activations that come from a layer or RMS norm, where a few channels are far larger than the
   rest, are first smoothed: channel j is divided by s_j and row j of the weights multiplied by it,
   with s_j = sqrt(max |x_j| / max |w_j|), scaled to a mean of 1 (SmoothQuant, arXiv 2211.10438,
   with alpha = 0.5);
3. weights are int8 with one scale per column, embedding tables int8 with one scale per row.

benchmarks/int8.py compares speed, fidelity and dependence on the batch with onnxruntime's methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Floats, Sequences, feed, no_prefix
from qrank.converters.checkpoint.evening import balance
from qrank.converters.four_bits import FourBits, four_bits, packed
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx

_LARGE_TABLE = 2**16
"""Minimum elements of an embedding table to quantize: words and positions, not token types."""

_GROUPED = ("weight", "scale", "zero")
"""A grouped product's constants, in the order of its inputs."""


def quantize(
    model: onnx.ModelProto,
    folder: Path,
    precision: str,
    *,
    keep: set[str],
    maxima: dict[str, Floats],
) -> None:
    """Quantize a graph's matrix products and large tables in place.

    Args:
        model: fp32; external weights are read one by one. Afterwards it contains all weights.
        folder: the folder of the model's file.
        precision: `int8` or `int4`. In `int4`, tables and the products that add to the residual sum
            are int8: 4 bits there cost the most.
        keep: names of nodes to leave unchanged: the score head's.
        maxima: from `channel_maxima`.
    """
    _Quantizer(model, folder, precision, keep, maxima).run()


def channel_maxima(path: Path, calibration: Sequences) -> dict[str, Floats]:
    """max |x_j| over all calibration tokens, for every norm's output.

    Args:
        path: the fp32 graph, with its weights in it or next to it.
        calibration: pairs to measure the channels on.
    """
    onnx, ort = need("onnx"), need("onnxruntime", extra="onnx")
    model = onnx.load(path, load_external_data=False)
    names = _normalized(model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # In the same folder because external weights are looked for there.
    seen = path.with_name("outputs.onnx")
    onnx.save(model, seen)
    session = ort.InferenceSession(str(seen), settings, providers=["CPUExecutionProvider"])
    seen.unlink()
    maxima: dict[str, Floats] = {}
    wanted = [i.name for i in session.get_inputs()]
    bare = next((no_prefix(i.shape) for i in session.get_inputs() if i.name == "prefix"), {})
    for i in range(len(calibration)):
        found = session.run(names, feed(wanted, calibration.take(np.array([i])), more=bare))
        for name, values in zip(names, found, strict=True):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            maxima[name] = np.maximum(maxima.get(name, largest), largest)
    return maxima


def _normalized(model: onnx.ModelProto) -> list[str]:
    """Outputs of layer norms and of the last step of RMS norms: a product with a weight vector."""
    vectors = {i.name for i in model.graph.initializer if len(i.dims) == 1 and i.dims[0] > 1}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "LayerNormalization"
        or (node.op_type == "Mul" and vectors & set(node.input))
    ]


class _Quantizer:
    """Rewrites one graph; holds what its nodes share."""

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        precision: str,
        keep: set[str],
        maxima: dict[str, Floats],
    ) -> None:
        self._onnx = need("onnx")
        self._model = model
        self._folder = folder
        self._precision = precision
        self._keep = keep
        self._maxima = maxima
        self._weights = {i.name: i for i in model.graph.initializer}
        self._sums = [n for n in model.graph.node if n.op_type == "Add"]
        self._nodes: list[onnx.NodeProto] = []
        self._added: dict[str, onnx.TensorProto] = {}
        self._rows: dict[str, tuple[str, str]] = {}

    def run(self) -> None:
        graph = self._model.graph
        # Types of intermediate values, which are about to change; runtimes do not need them.
        del graph.value_info[:]
        self._constant("qrank.step", np.float32(1 / 127))
        self._constant("qrank.zero", np.uint8(128))
        self._constant("qrank.tiny", np.float32(1e-12))
        self._constant("qrank.last", np.array([-1], np.int64))
        # Products that share an input share its smoothing, which depends on all their weights.
        smoothing = self._smoothing()
        for node in graph.node:
            if not self._quantizable(node):
                self._nodes.append(node)
            elif node.op_type == "MatMul":
                self._product(node, smoothing.get(node.input[0]))
            else:
                self._table(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        used = {name for node in graph.node for name in node.input}
        kept = [self._whole(name) for name in self._weights if name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *(w for w in self._added.values() if w.name in used)])
        self._model.opset_import.append(self._onnx.helper.make_opsetid("com.microsoft", 1))

    def _quantizable(self, node: onnx.NodeProto) -> bool:
        if node.name in self._keep:
            return False
        if node.op_type == "MatMul":
            return node.input[1] in self._weights
        if node.op_type == "Gather":
            table = self._weights.get(node.input[0])
            return (
                table is not None
                and table.data_type == self._onnx.TensorProto.FLOAT
                and len(table.dims) == 2
                and int(np.prod(table.dims)) >= _LARGE_TABLE
            )
        return False

    def _is_summed(self, node: onnx.NodeProto) -> bool:
        """Whether a product's output, with its bias, is added to other activations."""
        users = [add for add in self._sums if node.output[0] in add.input]
        return any(not set(add.input) & set(self._weights) or self._is_summed(add) for add in users)

    def _smoothing(self) -> dict[str, Floats]:
        """s for every norm's output that is multiplied by weights; shape [channels]."""
        largest: dict[str, Floats] = {}
        for node in self._model.graph.node:
            x = node.input[0] if node.op_type == "MatMul" else None
            if x in self._maxima and self._quantizable(node):
                rows = np.abs(self._array(node.input[1])).max(axis=1)
                largest[x] = np.maximum(largest.get(x, rows), rows)
        smoothing = {}
        for name, weights in largest.items():
            smoothing[name] = balance(self._maxima[name], weights)
        return smoothing

    def _product(self, node: onnx.NodeProto, smoothing: Floats | None) -> None:
        """x @ W -> (int8 x @ int8 W) * column scale * row scale; or with int4 W."""
        weights = self._array(node.input[1]).astype(np.float32)
        if smoothing is not None:
            weights *= smoothing[:, None]
        if self._precision == "int4" and not self._is_summed(node):
            found = four_bits(np.ascontiguousarray(weights.T))
            if found is not None:
                self._groups(node, found, smoothing)
                return
        quantized, scale = _int8(weights, axis=0)
        integers, row_scale = self._quantized_rows(node.input[0], smoothing)
        out = node.output[0]
        self._constant(f"{out}.weight", quantized)
        self._constant(f"{out}.scale", scale[0])
        self._node(
            "MatMulIntegerToFloat",
            [integers, f"{out}.weight", "qrank.step", f"{out}.scale", "qrank.zero"],
            f"{out}.unit",
            domain="com.microsoft",
        )
        self._node("Mul", [f"{out}.unit", row_scale], out)

    def _quantized_rows(self, x: str, smoothing: Floats | None) -> tuple[str, str]:
        """Names of x as uint8 around 128 and of the maximum absolute value of each row."""
        if x not in self._rows:
            even = self._even(x, smoothing)
            self._node("Abs", [even], f"{x}.abs")
            self._node("ReduceMax", [f"{x}.abs", "qrank.last"], f"{x}.max", keepdims=1)
            self._node("Max", [f"{x}.max", "qrank.tiny"], f"{x}.row")
            self._node("Div", [even, f"{x}.row"], f"{x}.unit")
            self._node("QuantizeLinear", [f"{x}.unit", "qrank.step", "qrank.zero"], f"{x}.int")
            self._rows[x] = (f"{x}.int", f"{x}.row")
        return self._rows[x]

    def _groups(self, node: onnx.NodeProto, weights: FourBits, smoothing: Floats | None) -> None:
        """x @ W, with W in groups of 4 bits and, if the runtime can, blocks of x in 8 bits."""
        out = node.output[0]
        self._constant(f"{out}.weight", packed(weights.integers))
        self._constant(f"{out}.scale", weights.scales.reshape(-1))
        self._constant(f"{out}.zero", packed(weights.zeros).reshape(-1))
        columns, groups, group = weights.integers.shape
        self._node(
            "MatMulNBits",
            [self._even(node.input[0], smoothing), *(f"{out}.{s}" for s in _GROUPED)],
            out,
            domain="com.microsoft",
            K=groups * group,
            N=columns,
            bits=4,
            block_size=group,
            accuracy_level=4,
        )

    def _even(self, x: str, smoothing: Floats | None) -> str:
        """Name of x, with its channels evened out."""
        if smoothing is None:
            return x
        if f"{x}.smoothing" not in self._added:
            self._constant(f"{x}.smoothing", (1 / smoothing).astype(np.float32))
            self._node("Mul", [x, f"{x}.smoothing"], f"{x}.even")
        return f"{x}.even"

    def _table(self, node: onnx.NodeProto) -> None:
        """table[ids] -> int8 table[ids] * scale[ids]."""
        quantized, scale = _int8(self._array(node.input[0]).astype(np.float32), axis=1)
        out, ids = node.output[0], node.input[1]
        self._constant(f"{out}.table", quantized)
        self._constant(f"{out}.scales", scale)
        self._node("Gather", [f"{out}.table", ids], f"{out}.int")
        self._node("Gather", [f"{out}.scales", ids], f"{out}.scale")
        self._node("Cast", [f"{out}.int"], f"{out}.float", to=self._onnx.TensorProto.FLOAT)
        self._node("Mul", [f"{out}.float", f"{out}.scale"], out)

    def _array(self, name: str) -> NDArray[np.generic]:
        array: NDArray[np.generic] = self._onnx.numpy_helper.to_array(self._whole(name))
        return array

    def _whole(self, name: str) -> onnx.TensorProto:
        """A weight with its data, which is read on each call if it is external."""
        weight = self._weights[name]
        helper = self._onnx.external_data_helper
        if not helper.uses_external_data(weight):
            return weight
        whole = self._onnx.TensorProto()
        whole.CopyFrom(weight)
        helper.load_external_data_for_tensor(whole, str(self._folder))
        whole.data_location = self._onnx.TensorProto.DEFAULT
        del whole.external_data[:]
        return whole

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> None:
        self._added[name] = self._onnx.numpy_helper.from_array(np.asarray(value), name)

    def _node(
        self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: int
    ) -> None:
        self._nodes.append(
            self._onnx.helper.make_node(
                kind, inputs, [output], name=f"{output}/{kind}", domain=domain, **attributes
            )
        )


def _int8(values: Floats, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """values as int8 and their scales along `axis`, kept with size 1; overwrites `values`."""
    scale = np.maximum(values.max(axis, keepdims=True), -values.min(axis, keepdims=True)) / 127
    scale[scale == 0] = 1
    values /= scale
    return np.rint(values, out=values).astype(np.int8), scale
