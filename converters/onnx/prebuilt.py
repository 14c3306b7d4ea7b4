"""A prebuilt ONNX graph -> one that returns one logit per pair, with qrank's inputs."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.graph_file import load_graph, save_graph
from qrank.converters.onnx.prebuilt_surgery import Surgery, graph_inputs, shape_of
from qrank.converters.prebuilt_graph import (
    LARGE,
    SQUASHED,
    WHOLE_PROMPTS,
    check_inputs,
    gives_vocabulary,
    precision_of,
)
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx

MODULES = ("transformers", "onnx", "onnxruntime")
"""Packages needed to import and run a file."""

_BLOCKED = ("MatMulNBits", "GatherBlockQuantized")
"""Operations whose weights are packed into bytes, with `bits` bits per number."""


def precision(path: Path) -> str:
    """The precision of a graph, by the data types of its weights.

    Raises:
        ConversionError: onnx cannot read the file.
    """
    model = _read(path, weights=False)
    packed = [n for n in model.graph.node if n.op_type in _BLOCKED]
    if any(a.name == "bits" and a.i == 4 for node in packed for a in node.attribute):
        return "int4"
    kinds = need("onnx").TensorProto.DataType
    numbers: Counter[str] = Counter()
    for weight in model.graph.initializer:
        if len(weight.dims) > 1 and prod(weight.dims) >= LARGE:
            numbers[kinds.Name(weight.data_type)] += prod(weight.dims)
    return precision_of(numbers)


def import_file(path: Path, checkpoint: Checkpoint, folder: Path) -> str:
    """Write `model.onnx` (and `model.onnx.data` above 2 GB) into a folder.

    Args:
        path: the prebuilt graph, with its weights in it or next to it.
        checkpoint: describes the model.
        folder: exists and is empty.

    Returns:
        A note on the graph for users, or "".

    Raises:
        ConversionError: the graph is not understood; with what was found.
    """
    family = checkpoint.family
    model = _read(path)
    check_inputs([i.name for i in graph_inputs(model)], family)
    output = _logits(model)
    surgery = Surgery(model)
    note = ""
    if gives_vocabulary(shape_of(output), family):
        if not surgery.cut(output.name, family.labels):
            note = WHOLE_PROMPTS
    else:
        surgery.renew(output.name, checkpoint)
    surgery.finish()
    save_graph(model, folder / "model.onnx")
    return note


def _read(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    try:
        model = load_graph(path, weights=weights)
    except ConversionError:
        raise
    except Exception as error:  # protobuf's, OSErrors, onnx's own: they share no base
        reason = " ".join(str(error).split())
        raise ConversionError(f"onnx cannot read {path}: {reason}") from error
    if not model.graph.output:
        raise ConversionError(f"onnx cannot read {path}: it holds no graph")
    return model


def _logits(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The output that holds logits: the one called `logits`, or the only one."""
    outputs = {o.name: o for o in model.graph.output}
    found = outputs.get("logits") or (model.graph.output[0] if len(outputs) == 1 else None)
    if found is None:
        raise ConversionError(f"the graph gives {', '.join(sorted(outputs))}; logits were expected")
    for node in model.graph.node:
        if found.name in node.output and node.op_type in SQUASHED:
            raise ConversionError(f"the graph ends in {node.op_type}; raw logits were expected")
    return found
