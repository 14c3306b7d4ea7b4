"""A prebuilt OpenVINO graph -> one that returns one logit per pair, with qrank's inputs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.openvino.export import bound, check
from qrank.converters.openvino.prebuilt_decoder import (
    Cache,
    Cut,
    matrix_rows,
    positions,
    replace,
    shape_of,
)
from qrank.converters.prebuilt_graph import (
    IDS,
    LARGE,
    MASK,
    POSITIONS,
    SQUASHED,
    TYPES,
    WHOLE_PROMPTS,
    check_inputs,
    first_position,
    gives_vocabulary,
    padding,
    precision_of,
)
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

MODULES = ("transformers", "openvino")
"""Packages needed to import and run a file."""


def precision(path: Path) -> str:
    """The precision of a graph, by the data types of its weights.

    Raises:
        ConversionError: openvino cannot read the file.
    """
    numbers: Counter[str] = Counter()
    for node in _read(path).get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            return "int8-w8a8"
        if node.get_type_name() == "Constant":
            shape = node.output(0).shape
            if len(shape) > 1 and math.prod(shape) >= LARGE:
                numbers[node.get_element_type().to_string()] += math.prod(shape)
    return precision_of(numbers)


def import_file(path: Path, checkpoint: Checkpoint, folder: Path) -> str:
    """Write `model.xml` and `model.bin` into a folder.

    Args:
        path: the prebuilt graph, with its weights next to it.
        checkpoint: describes the model.
        folder: exists and is empty.

    Returns:
        A note on the graph for users, or "".

    Raises:
        ConversionError: the graph is not understood; with what was found.
    """
    ov, family = need("openvino"), checkpoint.family
    graph = _read(path)
    inputs = {i.get_any_name(): i.get_node() for i in graph.inputs}
    cache = Cache.of(graph)
    check_inputs(inputs, family)
    logits = _logits(graph)
    note = ""
    try:
        if gives_vocabulary(shape_of(logits), family):
            graph = Cut(inputs, cache, logits).graph(family.labels)
            note = "" if cache.past else WHOLE_PROMPTS
        else:
            graph = _renewed(inputs, logits, checkpoint)
        bound(graph, family.max_length)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"{path.name} cannot be imported: batch and length must be free, and openvino says "
            f"{reason}"
        ) from error
    # Weights already have their final precision.
    ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    check(folder / "model.xml")
    return note


def _read(path: Path) -> openvino.Model:
    try:
        return need("openvino").Core().read_model(path)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"openvino cannot read {path}: {reason}") from error


def _logits(graph: openvino.Model) -> Any:
    """The value that holds logits: the source of the output called `logits`, or of the only one."""
    outputs = {name: o for o in graph.outputs for name in o.get_names()}
    if "logits" in outputs:
        found = outputs["logits"]
    elif len(graph.outputs) == 1:
        found = graph.output(0)
    else:
        raise ConversionError(f"the graph gives {', '.join(sorted(outputs))}; logits were expected")
    source = found.get_node().input_value(0)
    if (last := source.get_node().get_type_name()) in SQUASHED:
        raise ConversionError(f"the graph ends in {last}; raw logits were expected")
    return source


def _renewed(inputs: dict[str, Any], logits: Any, checkpoint: Checkpoint) -> openvino.Model:
    """A graph of one logit per pair with qrank's inputs: int64 and only the family's."""
    ov = need("openvino")
    op, family = ov.opset13, checkpoint.family
    fresh = {}
    for name in (IDS, MASK, TYPES):
        if name in inputs and (name != TYPES or family.segments is not None):
            fresh[name] = op.parameter([-1, -1], ov.Type.i64, name=name)
            fresh[name].output(0).get_tensor().set_names({name})
    ids, mask = fresh[IDS], fresh[MASK]
    given = {**fresh, POSITIONS: positions(ids, np.int64(first_position(checkpoint)))}
    given.setdefault(TYPES, op.multiply(ids, np.int64(0)))
    if family.decoder:
        # Such a graph finds the last token by looking for padding ids.
        given[IDS] = op.select(op.equal(mask, np.int64(0)), np.int64(padding(checkpoint)), ids)
    for name, node in inputs.items():
        replace(node.output(0), given[name])
    logits.get_tensor().set_names({"logits"})
    graph = ov.Model([logits], list(fresh.values()), "qrank")
    _unpack_rows(graph)
    return graph


def _unpack_rows(graph: openvino.Model) -> None:
    """Store matrices of one row (a head's) in fp32; `backends.openvino_nodes` explains why."""
    op = need("openvino").opset13
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        weights = node.input_value(1).get_node()
        axis = 0 if node.get_attributes()["transpose_b"] else 1
        shape = shape_of(weights.output(0))
        packed = weights.get_type_name() in ("Convert", "Multiply", "Transpose", "Reshape")
        if packed and len(shape) == 2 and shape[axis] == 1 and None not in shape:
            row = matrix_rows(weights, [0], axis)
            replace(weights.output(0), op.constant(row if axis == 0 else row.T))
