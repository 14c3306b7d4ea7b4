"""A checkpoint -> an OpenVINO graph that returns one logit per pair.

It exports its own fp32 ONNX graph with `converters/onnx/export.py` into a temporary folder. To save
memory, weights are stored next to the graph, a decoder's in their stored data type, and constants
are not folded. OpenVINO reads that graph. Then `converters/openvino/weights.py` shrinks the
weights. docs/benchmarks.md compares this with optimum-intel's method.
"""

from __future__ import annotations

import gc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.evening import even, scalings
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.onnx.export import HEAD, export
from qrank.converters.openvino.weights import shrink
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

MODULES = ("torch", "transformers", "safetensors", "onnx", "onnxscript", "openvino")
"""Modules needed to convert and verify."""

MEMORY = 0.8
"""The minimum memory for converting, as a multiple of the size in fp32 (docs/benchmarks.md)."""


_LENGTHS = {
    "input_ids": (1, 1),
    "attention_mask": (1, 1),
    "token_type_ids": (1, 1),
    "prefix": (3, 0),
    "keep": (0, 0),
}
"""The dimension of an input that is a length, and its minimum."""


def disk(number: float) -> float:
    """Disk bytes per weight during conversion, given `number` bytes afterwards.

    The graph in fp32 exists at the same time.
    """
    return 4.0 + number


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.xml` and `model.bin` into a folder.

    Args:
        checkpoint: loaded here; a decoder's matrices in their stored data type.
        precision: one of the format's `made` precisions. The head stays fp32.
        folder: exists and is empty.
        calibration: pairs whose activations say how to even out channels.

    Returns:
        "": there is no note.

    Raises:
        ConversionError: the graph cannot be exported, or the written files are incomplete.
    """
    ov = need("openvino")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        path = Path(temporary) / "model.onnx"
        found = {} if precision == "fp16" else scalings(checkpoint, calibration)
        model = checkpoint.load(lean=True)
        even(model, found)
        # Folding constants takes memory; instead, weights are handled one by one here.
        export(model, checkpoint, path, in_one_file=False, optimize=False)
        del model
        gc.collect()  # The exporter leaves reference cycles that hold the weights.
        graph = ov.Core().read_model(path)
        bound(graph, checkpoint.family.max_length)
        head = set() if checkpoint.family.decoder else head_nodes(graph)
        shrink(graph, precision, keep=head)
        # Weights already have their final precision; others, like the head's, must not shrink.
        ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    check(folder / "model.xml")
    return ""


def head_nodes(graph: openvino.Model) -> set[str]:
    """Names of the score head's nodes: those that use its weights, and all that follow.

    Raises:
        ConversionError: there are none.
    """
    weights: set[str] = set()
    found: set[str] = set()
    for node in graph.get_ordered_ops():
        name = node.get_friendly_name()
        sources = {i.get_source_output().get_node().get_friendly_name() for i in node.inputs()}
        if node.get_type_name() == "Constant":
            if HEAD & set(name.split(".")):
                weights.add(name)
        elif sources & (weights | found):
            found.add(name)
    if not found:
        raise ConversionError("no score head was found in the converted graph")
    return found


def check(path: Path) -> None:
    """Check that a saved graph is complete: the XML parses, the BIN has the size the XML implies.

    Raises:
        ConversionError: it is not complete; with the reason.
    """
    try:
        layers = ElementTree.parse(path).getroot().iter("data")
    except (OSError, ElementTree.ParseError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ConversionError(
            f"openvino wrote {size} bytes of {path.name}, which is no XML: {error}"
        ) from error
    ends = [int(x.get("offset", 0)) + int(x.get("size", 0)) for x in layers if "offset" in x.attrib]
    weights = path.with_suffix(".bin")
    size = weights.stat().st_size if weights.is_file() else 0
    expected = max(ends, default=0)
    if not expected or size != expected:
        raise ConversionError(
            f"openvino wrote {size:,} bytes of {weights.name}; its XML speaks of {expected:,}"
        )


def bound(graph: openvino.Model, longest: int) -> None:
    """Write the family's length limit into the graph's inputs: no runtime may pad beyond it.

    Args:
        graph: changed in place.
        longest: maximum number of tokens the model reads.

    Raises:
        RuntimeError: the graph does not accept these shapes.
    """
    ov = need("openvino")
    shapes = {}
    for node in graph.inputs:
        shape = ov.PartialShape(node.partial_shape)
        if node.any_name in _LENGTHS:
            place, least = _LENGTHS[node.any_name]
            shape[place] = ov.Dimension(least, longest)
        shapes[node.any_name] = shape
    graph.reshape(shapes)
