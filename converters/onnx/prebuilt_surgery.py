"""Surgery on an ONNX graph: replace its inputs and its head.

New nodes provide the values of the old inputs, so that the rest of the graph does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.family import label_row
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.onnx.prebuilt_head import Head
from qrank.converters.prebuilt_graph import (
    IDS,
    MASK,
    POSITIONS,
    TYPES,
    cache_place,
    cache_shape,
    first_position,
    padding,
)
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx

_OLDEST = 13
"""The first opset whose Squeeze and ReduceSum take their axes as inputs, as used here."""


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The real inputs of a graph: old graphs also list their weights as inputs."""
    weights = {i.name for i in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in weights]


def shape_of(value: onnx.ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else None for d in dims]


class Surgery:
    """One graph being rewritten; new nodes go in front of it or behind it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._onnx = need("onnx")
        self._model = model
        self._given = {i.name: i for i in graph_inputs(model)}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._front: list[onnx.NodeProto] = []
        self._back: list[onnx.NodeProto] = []
        self._nodes = self._front
        self._count = 0
        # Free the names of inputs and outputs for the new ones.
        names = {*self._given, *(o.name for o in model.graph.output)}
        _rename(model.graph.node, {name: _old(name) for name in names})

    def renew(self, logits: str, checkpoint: Checkpoint) -> None:
        """Keep the output of one logit per pair; make the inputs int64 and only the family's."""
        family = checkpoint.family
        for name in (IDS, MASK, TYPES):
            if name in self._given and (name != TYPES or family.segments is not None):
                self._input(name, [None, None])
        ids = IDS
        if family.decoder:
            # Such a graph finds the last token by looking for padding ids.
            kept = self._node("Cast", [MASK], to=self._onnx.TensorProto.BOOL)
            ids = self._node("Where", [kept, IDS, self._number(padding(checkpoint))])
        self._give(IDS, ids)
        self._give(MASK, MASK)
        if TYPES in self._given:
            zeros = self._node("Mul", [IDS, self._number(0)])
            self._give(TYPES, zeros if family.segments is None else TYPES)
        if POSITIONS in self._given:
            self._give(POSITIONS, self._positions(self._number(first_position(checkpoint))))
        self._nodes = self._back
        self._output(_old(logits), "logits", [None, 1])

    def cut(self, logits: str, labels: Sequence[int]) -> bool:
        """Turn a causal model into `qrank.converters.checkpoint.scoring_graph.DecoderScorer`.

        Returns:
            Whether it can continue from a prefix.

        Raises:
            ConversionError: the opset is too old, or the cache or the head is not understood.
        """
        opset = max(o.version for o in self._model.opset_import if o.domain in ("", "ai.onnx"))
        if opset < _OLDEST:
            raise ConversionError(f"the graph is of opset {opset}; {_OLDEST} or later was expected")
        past = {p: i for name, i in self._given.items() if (p := cache_place(name)) is not None}
        self._input(IDS, [None, None])
        self._input("last", [None])
        self._give(IDS, IDS)
        before = self._constant(np.zeros(1, np.int64))
        if past:
            before = self._read_on(past)
        total = self._node("Add", [before, self._size(IDS, 1)])
        if MASK in self._given:
            shape = self._node("Concat", [self._size(IDS, 0), total], axis=0)
            self._give(MASK, self._node("Expand", [self._number(1), shape]))
        if POSITIONS in self._given:
            self._give(POSITIONS, self._positions(self._node("Squeeze", [before])))
        head = Head(self._model, _old(logits))
        row = label_row(head.rows(labels))[None]
        self._nodes = self._back
        places = self._node("Unsqueeze", ["last", self._constant(np.array([1]))])
        state = self._node("GatherND", [head.states, places], batch_dims=1)
        final = self._node("Cast", [state], to=self._onnx.TensorProto.FLOAT)
        # Not a matrix product, so that quantization of matrix products leaves this row alone.
        products = self._node("Mul", [final, self._constant(row)])
        score = self._node("ReduceSum", [products, self._constant(np.array([1]))], keepdims=1)
        self._output(score, "logits", [None, 1])
        if past:
            self._keep(past, before)
        return bool(past)

    def finish(self) -> None:
        """Put the graph together, without nodes and weights that are no longer used."""
        graph = self._model.graph
        nodes = [*self._front, *graph.node, *self._back]
        wanted = {output.name for output in self._outputs}
        kept = []
        for node in reversed(nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= _read_by(node)
        weights = [weight for weight in graph.initializer if weight.name in wanted]
        del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
        del graph.initializer[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(weights)
        graph.input.extend(self._inputs)
        graph.output.extend(self._outputs)

    def _read_on(self, past: dict[tuple[int, int], onnx.ValueInfoProto]) -> str:
        """Give every layer its part of the prefix; return the prefix's length, shape [1]."""
        outputs = {cache_place(o.name): o for o in self._model.graph.output}
        present = {place: o for place, o in outputs.items() if place is not None}
        shapes = {place: shape_of(i) for place, i in past.items()}
        layers, heads, width = cache_shape(shapes, present)
        self._input("prefix", [layers, 2, heads, None, width], self._onnx.TensorProto.FLOAT)
        self._input("keep", [None])
        batch = self._size(IDS, 0)
        shape = self._node("Concat", [batch, self._constant(np.ones(3, np.int64))], axis=0)
        for (layer, kind), value in past.items():
            both = self._node("Gather", ["prefix", self._number(layer)], axis=0)
            one = self._node("Gather", [both, self._constant(np.array([kind]))], axis=0)
            self._give(value.name, self._node("Expand", [one, shape]))
        return self._size("prefix", 3)

    def _keep(self, past: dict[tuple[int, int], Any], before: str) -> None:
        """Add the output `present`: keys and values at some positions of the first sequence."""
        outputs = {cache_place(o.name): _old(o.name) for o in self._model.graph.output}
        layers = max(layer for layer, _ in past) + 1
        first = self._constant(np.zeros(1, np.int64))
        places, rows = self._node("Add", ["keep", before]), []
        for layer in range(layers):
            halves = [
                self._node(
                    "Gather",
                    [self._node("Gather", [outputs[layer, kind], first], axis=0), places],
                    axis=2,
                )
                for kind in (0, 1)
            ]
            both = self._node("Concat", halves, axis=0)
            rows.append(self._node("Unsqueeze", [both, self._constant(np.zeros(1, np.int64))]))
        value = next(iter(past.values()))
        _, heads, _, width = shape_of(value)
        whole = self._node("Concat", rows, axis=0)
        self._output(whole, "present", [layers, 2, heads, None, width])

    def _positions(self, first: str) -> str:
        """Consecutive numbers from `first` on, for every sequence."""
        zero, one = self._number(0), self._number(1)
        length = self._node("Squeeze", [self._size(IDS, 1)])
        numbers = self._node("Add", [self._node("Range", [zero, length, one]), first])
        return self._node("Expand", [numbers, self._node("Shape", [IDS])])

    def _input(self, name: str, shape: list[int | None], kind: int | None = None) -> None:
        """Add an input of the new graph."""
        kind = kind or self._onnx.TensorProto.INT64
        dims = [n if n is not None else f"{name}.{i}" for i, n in enumerate(shape)]
        self._inputs.append(self._onnx.helper.make_tensor_value_info(name, kind, dims))

    def _give(self, name: str, value: str) -> None:
        """Replace an old input of the graph with a value, cast to the input's type."""
        kind = self._given[name].type.tensor_type.elem_type
        self._front.append(self._onnx.helper.make_node("Cast", [value], [_old(name)], to=kind))

    def _output(self, value: str, name: str, shape: list[int | None]) -> None:
        kind = self._onnx.TensorProto.FLOAT
        self._back.append(self._onnx.helper.make_node("Cast", [value], [name], to=kind))
        dims = [n if n is not None else f"{name}.{i}" for i, n in enumerate(shape)]
        self._outputs.append(self._onnx.helper.make_tensor_value_info(name, kind, dims))

    def _size(self, value: str, place: int) -> str:
        """One dimension of a value, shape [1]."""
        shape = self._node("Shape", [value])
        return self._node("Gather", [shape, self._constant(np.array([place]))], axis=0)

    def _number(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _constant(self, value: NDArray[Any]) -> str:
        self._count += 1
        name = f"qrank.constant.{self._count}"
        self._model.graph.initializer.append(self._onnx.numpy_helper.from_array(value, name))
        return name

    def _node(self, kind: str, inputs: list[str], **attributes: int) -> str:
        self._count += 1
        name = f"qrank.{kind}.{self._count}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name


def _old(name: str) -> str:
    """The name of the prebuilt graph's input or output within the new graph."""
    return f"given.{name}"


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
        for graph in _within(node):
            _rename(graph.node, names)


def _within(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs within a node: branches and loops."""
    single = [a.g for a in node.attribute if a.HasField("g")]
    return [*single, *(graph for a in node.attribute for graph in a.graphs)]


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Names that a node and the graphs within it read."""
    return set(node.input).union(*(_read_by(n) for graph in _within(node) for n in graph.node))
