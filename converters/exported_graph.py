"""An ONNX graph -> the same one for programs with onnxruntime's default settings.

x86 CPUs without VNNI multiply unsigned by signed 8-bit numbers with an instruction that adds two
products in 16 bits, which overflows: logits of `mini` were off by 4.5. qrank tells onnxruntime to
avoid it (`session.x64quantprecision`); other programs do not. Products of two unsigned numbers are
exact on every CPU, so an exported graph has unsigned weights: w + 128, with 128 as the zero point.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrank.converters.graph_file import load_graph, save_graph
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx

EXTRA = "export"
"""The extra that installs onnx alone."""

WEIGHTS = "{name}_data"
"""The name of a graph's file of weights that optimum and transformers.js expect."""

_PRODUCTS = {"MatMulInteger": (2, 3), "MatMulIntegerToFloat": (4, 5)}
"""Operation on integers a and b -> the places of their zero points among its inputs."""

_MIDDLE = 128


def write_graph(source: Path, target: Path, *, quantized: bool) -> None:
    """Copy a graph so that other programs load it and compute what qrank does.

    Args:
        source: the graph's file.
        target: its new place; weights above 2 GB go next to it.
        quantized: whether it multiplies integers.
    """
    if not quantized and not source.with_name(f"{source.name}.data").exists():
        shutil.copyfile(source, target)
        return
    need("onnx", extra=EXTRA)
    model = load_graph(source)
    _make_unsigned(model)
    save_graph(model, target, WEIGHTS)


def _make_unsigned(model: onnx.ModelProto) -> None:
    """Make the weights of products with unsigned activations unsigned."""
    onnx = need("onnx", extra=EXTRA)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    unsigned = {name for name, t in weights.items() if t.data_type == t.UINT8}
    unsigned |= {o for n in graph.node if n.op_type == "DynamicQuantizeLinear" for o in n.output}
    signed = {name for name, t in weights.items() if t.data_type == t.INT8}
    zero = onnx.numpy_helper.from_array(np.array(_MIDDLE, np.uint8), "exported.zero")
    added = {}
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        left, right = _PRODUCTS[node.op_type]
        inputs = [*node.input, *[""] * (right + 1 - len(node.input))]
        if inputs[left] not in unsigned or inputs[1] not in signed:
            continue
        for place in (1, right):
            name = inputs[place]
            made = zero
            if name:
                # In two's complement, adding 128 flips the first bit.
                flipped = onnx.numpy_helper.to_array(weights[name]).view(np.uint8) ^ _MIDDLE
                made = onnx.numpy_helper.from_array(flipped, f"{name}.unsigned")
            added[made.name] = made
            inputs[place] = made.name
        node.input[:] = inputs
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in (*weights.values(), *added.values()) if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
