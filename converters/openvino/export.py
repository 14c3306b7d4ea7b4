"""A checkpoint -> an OpenVINO graph that gives one logit a pair.

It exports an fp32 ONNX graph of its own with `converters/onnx/export.py`, into a temporary folder:
weights beside the graph, as stored where they are a decoder's, and no constants folded, which saves
memory. OpenVINO reads that graph. `converters/openvino/weights.py` shrinks the weights, or NNCF
quantizes weights and activations. docs/benchmarks.md compares this with optimum-intel's way.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from qrank.bundle.sequences import Sequences, feed
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.logs import errors_only
from qrank.converters.onnx.export import HEAD, export
from qrank.converters.openvino.weights import shrink
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import openvino

MODULES = ("torch", "transformers", "safetensors", "onnx", "onnxscript", "openvino", "nncf")
"""What converting and verifying takes."""

MEMORY = 0.8
"""The least memory converting takes, in times of the model's size in fp32 (docs/benchmarks.md)."""


_LENGTHS = {
    "input_ids": (1, 1),
    "attention_mask": (1, 1),
    "token_type_ids": (1, 1),
    "prefix": (3, 0),
    "keep": (0, 0),
}
"""Which of an input's dimensions is a length, and the least it may be."""


def disk(number: float) -> float:
    """Bytes of disk that a weight takes while it is made, if it takes `number` once it is.

    The graph in fp32 lies beside.
    """
    return 4.0 + number


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.xml` and `model.bin` into a folder.

    Args:
        checkpoint: loaded here; a decoder's matrices as they are stored.
        precision: one of those that are `made`. `int8` is weights alone, `int8-w8a8` activations
            too. The head stays fp32.
        folder: exists and is empty.
        calibration: pairs whose activations `int8-w8a8` looks at.

    Returns:
        "": there is nothing to add to the precision's name.

    Raises:
        ConversionError: the graph cannot be exported, or what was written is not whole; or
            `int8-w8a8` of a decoder family.
    """
    ov = need("openvino")
    if precision == "int8-w8a8" and checkpoint.family.decoder:
        raise ConversionError(
            "int8-w8a8 is for encoder families: one scale for all activations does not fit the few "
            "very large ones of causal language models. Take int8, whose activations are quantized "
            "as they come"
        )
    with TemporaryDirectory(dir=folder.parent) as temporary:
        path = Path(temporary) / "model.onnx"
        activations = precision == "int8-w8a8"
        model = checkpoint.load(lean=True)
        # What folding does to weights takes memory, and is done here one by one.
        export(model, checkpoint.family, path, in_one_file=False, optimize=False)
        del model
        gc.collect()  # The exporter leaves cycles, which hold the weights.
        graph = ov.convert_model(path) if activations else ov.Core().read_model(path)
        bound(graph, checkpoint.family.max_length)
        head = set() if checkpoint.family.decoder else head_nodes(graph)
        if activations:
            graph = _quantize(graph, head, calibration)
        else:
            shrink(graph, precision, keep=head)
        # Weights are in the precision they shall have: nothing else, like the head's, shrinks.
        ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    check(folder / "model.xml")
    return ""


def head_nodes(graph: openvino.Model) -> set[str]:
    """Names of the score head's nodes: the first that uses its weights, and what follows."""
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
    """See that a saved graph is whole: its XML parses, its BIN has the size that the XML implies.

    Raises:
        ConversionError: it is not; with the reason.
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
        longest: tokens the model reads at most.

    Raises:
        RuntimeError: the graph is made for other shapes.
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


def _quantize(graph: openvino.Model, head: set[str], calibration: Sequences) -> openvino.Model:
    """Weights and activations in int8, by what the activations of some pairs are."""
    nncf = need("nncf")
    names = [i.any_name for i in graph.inputs]
    pairs = [feed(names, calibration.take(np.array([i]))) for i in range(len(calibration))]
    with _quiet():
        quantized: openvino.Model = nncf.quantize(
            graph,
            nncf.Dataset(pairs),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(pairs),
            ignored_scope=nncf.IgnoredScope(names=sorted(head)),
        )
    return quantized


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF logs every node it leaves out and draws progress bars, all of it on stdout."""
    with errors_only("nncf"), redirect_stdout(io.StringIO()):
        yield
