"""A causal model's OpenVINO graph -> one like `DecoderScorer` in `checkpoint/scoring_graph.py`.

`prefix` and `present` replace the state, or the inputs and outputs, that hold keys and values. The
score's row at the last token replaces the vocabulary's logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.family import label_row
from qrank.bundle.sequences import Floats
from qrank.converters.prebuilt_graph import (
    BEAMS,
    IDS,
    MASK,
    POSITIONS,
    cache_place,
    cache_shape,
    not_understood,
)
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

_PLAIN = ("f32", "f16", "u8", "i8")
"""Types that numpy also has: single rows of these can be read without converting all others."""


@dataclass(frozen=True)
class Cache:
    """A graph's KV cache: where keys and values come from and go to, by (layer, 0 or 1).

    Attributes:
        past: outputs of nodes: the state that is read, or an input.
        present: outputs of nodes: the state's new value, or the source of an output.
    """

    past: Mapping[tuple[int, int], Any]
    present: Mapping[tuple[int, int], Any]

    @classmethod
    def of(cls, graph: openvino.Model) -> Cache:
        """The KV cache of a graph; empty if it has none.

        Raises:
            ConversionError: a state does not hold keys or values.
        """
        past, present = {}, {}
        for node in graph.get_ordered_ops():
            if (kind := node.get_type_name()) not in ("ReadValue", "Assign"):
                continue
            name = node.get_attributes()["variable_id"]
            if (place := cache_place(name)) is None:
                raise ConversionError(
                    f"the graph's state {name} is not understood; known are: past_key_values.N.key "
                    "and .value"
                )
            if kind == "ReadValue":
                past[place] = node.output(0)
            else:
                present[place] = node.input_value(0)
        for node in graph.inputs:
            if (place := cache_place(node.get_any_name())) is not None:
                past[place] = node.get_node().output(0)
        for node in graph.outputs:
            for place in filter(None, map(cache_place, node.get_names())):
                present[place] = node.get_node().input_value(0)
        return cls(past, present)


class Cut:
    """One graph being rewritten."""

    def __init__(self, inputs: Mapping[str, Any], cache: Cache, logits: Any) -> None:
        """Take over a graph.

        Args:
            inputs: its parameters by name.
            cache: its KV cache.
            logits: the output with the logits of the whole vocabulary.
        """
        self._op = need("openvino").opset13
        self._inputs = inputs
        self._cache = cache
        self._logits = logits

    def graph(self, labels: Sequence[int]) -> openvino.Model:
        """The scoring graph for these tokens.

        Raises:
            ConversionError: the cache or the head is not understood.
        """
        ov, op = need("openvino"), self._op
        ids, last = _parameter(IDS, [-1, -1]), _parameter("last", [-1])
        parameters, results = [ids, last], []
        before = op.constant(np.zeros(1, np.int64))
        if self._cache.past:
            shapes = {place: shape_of(output) for place, output in self._cache.past.items()}
            layers, heads, width = cache_shape(shapes, self._cache.present)
            prefix = _parameter("prefix", [layers, 2, heads, -1, width], ov.Type.f32)
            keep = _parameter("keep", [-1])
            parameters += [prefix, keep]
            before = _size(prefix, 3)
            self._give(prefix, op.concat([_size(ids, 0), np.ones(3, np.int64)], 0))
            results.append(self._kept(op.add(keep, before), layers))
        results.insert(0, self._score(last, labels))
        total = op.concat([_size(ids, 0), op.add(before, _size(ids, 1))], 0)
        given = {
            IDS: ids,
            MASK: op.broadcast(np.int64(1), total),
            POSITIONS: positions(ids, op.squeeze(before, np.int64(0))),
        }
        for name, node in self._inputs.items():
            if name in given:
                replace(node.output(0), given[name])
            elif name == BEAMS:
                # Every sequence continues from the same prefix: there is nothing to choose.
                for target in node.output(0).get_target_inputs():
                    if (user := target.get_node()).get_type_name() != "Gather":
                        raise ConversionError(
                            f"{user.get_type_name()} {user.get_friendly_name()} reads {BEAMS}, "
                            "where a Gather of keys or values was expected"
                        )
                    replace(user.output(0), user.input_value(0).get_node())
        return ov.Model(results, parameters, "qrank")

    def _give(self, prefix: Any, repeats: Any) -> None:
        """Give every layer its part of the prefix, for every sequence of the batch."""
        op = self._op
        for (layer, kind), output in self._cache.past.items():
            both = op.gather(prefix, np.int64(layer), np.int64(0))
            one = op.gather(both, np.array([kind]), np.int64(0))
            replace(output, op.broadcast(one, repeats, broadcast_spec="BIDIRECTIONAL"))

    def _kept(self, places: Any, layers: int) -> Any:
        """The output `present`: keys and values at some positions of the first sequence."""
        op, rows = self._op, []
        for layer in range(layers):
            halves = [
                op.gather(
                    op.gather(self._cache.present[layer, kind], np.array([0]), np.int64(0)),
                    places,
                    np.int64(2),
                )
                for kind in (0, 1)
            ]
            rows.append(op.unsqueeze(op.concat(halves, 0), np.int64(0)))
        return _named(op.convert(op.concat(rows, 0), "f32"), "present")

    def _score(self, last: Any, labels: Sequence[int]) -> Any:
        """The output `logits`: one number from the labels' logits at each sequence's last token."""
        op = self._op
        product = _through(self._logits.get_node(), "Convert")
        if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_a"]:
            raise not_understood(f"{product.get_type_name()} {product.get_friendly_name()}")
        turned = product.get_attributes()["transpose_b"]
        rows = matrix_rows(product.input_value(1).get_node(), labels, 0 if turned else 1)
        row: Floats = label_row(rows)[None]
        place = op.unsqueeze(last, np.int64(1))
        state = op.gather(product.input_value(0), place, np.int64(1), batch_dims=1)
        final = op.convert(op.squeeze(state, np.int64(1)), "f32")
        # Not a matrix product, so that quantization of matrix products leaves this row alone.
        return _named(op.reduce_sum(op.multiply(final, row), np.int64(1), keep_dims=True), "logits")


def replace(output: Any, node: Any) -> None:
    """Replace an output with another node, converted to the output's type."""
    wanted = output.get_element_type()
    if node.output(0).get_element_type() != wanted:
        node = need("openvino").opset13.convert(node, wanted.to_string())
    for target in output.get_target_inputs():
        target.replace_source_output(node.output(0))


def shape_of(output: Any) -> list[int | None]:
    """An output's shape; None for a dynamic dimension, [] for a dynamic rank."""
    shape = output.partial_shape
    if shape.rank.is_dynamic:
        return []
    return [None if d.is_dynamic else d.get_length() for d in shape]


def positions(ids: Any, first: Any) -> Any:
    """Consecutive numbers from `first` on, in the shape of `ids`."""
    op = need("openvino").opset13
    length = op.squeeze(_size(ids, 1), np.int64(0))
    numbers = op.range(op.constant(np.int64(0)), length, op.constant(np.int64(1)), "i64")
    return op.broadcast(op.add(numbers, first), op.shape_of(ids))


def _parameter(name: str, shape: list[int], kind: Any = None) -> Any:
    ov = need("openvino")
    return _named(ov.opset13.parameter(shape, kind or ov.Type.i64, name=name), name)


def _named(node: Any, name: str) -> Any:
    node.output(0).get_tensor().set_names({name})
    return node


def _size(node: Any, place: int) -> Any:
    """One dimension of a node, shape [1]."""
    op = need("openvino").opset13
    return op.gather(op.shape_of(node), np.array([place]), np.int64(0))


def _through(node: Any, kind: str) -> Any:
    while node.get_type_name() == kind:
        node = node.input_value(0).get_node()
    return node


def matrix_rows(node: Any, labels: Sequence[int], axis: int) -> Floats:
    """Some rows of the output matrix, dequantized to fp32; shape [labels, hidden].

    Args:
        node: the node that returns the matrix.
        labels: indices of the rows.
        axis: the axis of the matrix that they index.

    Raises:
        ConversionError: the matrix is made in an unknown way.
    """
    shape = list(node.output(0).shape)
    found = _part(node, labels, axis, shape[axis])
    rows = found.reshape(len(labels), -1) if axis == 0 else found.reshape(-1, len(labels)).T
    return np.ascontiguousarray(rows, np.float32)


def _part(node: Any, labels: Sequence[int], axis: int, count: int) -> NDArray[Any]:
    """The value of a constant expression at some indices along one axis."""
    kind = node.get_type_name()
    if kind == "Constant":
        plain = node.get_element_type().to_string() in _PLAIN
        values: NDArray[Any] = node.data if plain else node.get_data(dtype=np.float32)
        if values.ndim > axis and values.shape[axis] == count:
            values = values.take(labels, axis)
        return values
    inputs = [node.input_value(i).get_node() for i in range(node.get_input_size())]
    if kind == "Convert":
        return _part(inputs[0], labels, axis, count).astype(np.float32)
    if kind in ("Subtract", "Multiply"):
        a, b = (_part(x, labels, axis, count) for x in inputs)
        made: NDArray[Any] = a - b if kind == "Subtract" else a * b
        return made
    if kind == "Transpose":
        return _part(inputs[0], labels, 1 - axis, count).T
    if kind == "Reshape" and axis == 0:
        # Join the groups of a row, each of which has its own scale.
        return _part(inputs[0], labels, axis, count).reshape(len(labels), -1)
    raise not_understood(f"a matrix that {kind} {node.get_friendly_name()} makes")
