"""A checkpoint -> an OpenVINO graph that gives one logit a pair.

One way for every family: the ONNX graph of `converters/onnx.py`, read by OpenVINO, compressed or
quantized by NNCF. docs/benchmarks.md holds it against optimum-intel's way.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from qrank.converters.checkpoint import Checkpoint
from qrank.converters.logs import errors_only
from qrank.converters.onnx import HEAD, export
from qrank.errors import ConversionError
from qrank.extras import need
from qrank.work import Work, feed

if TYPE_CHECKING:
    import openvino

PRECISIONS = ("int8", "int8-full", "fp16")
MODULES = ("torch", "transformers", "safetensors", "onnx", "onnxscript", "openvino", "nncf")
"""What converting and verifying takes."""


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Work) -> str:
    """Write `model.xml` and `model.bin` into a folder.

    Args:
        checkpoint: loaded here, in fp32.
        precision: one of PRECISIONS. `int8` is weights alone, `int8-full` activations too. The
            head stays fp32.
        folder: exists and is empty.
        calibration: pairs whose activations `int8-full` looks at.

    Returns:
        "": there is nothing to add to the precision's name.

    Raises:
        ConversionError: the graph cannot be exported, or what was written is not whole.
    """
    ov = need("openvino")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        path = Path(temporary) / "model.onnx"
        export(checkpoint.load(), checkpoint.family, path, in_one_file=False)
        graph = ov.convert_model(path)
        _bound(graph, checkpoint.family.max_length)
        head = head_nodes(graph)
        if precision == "fp16":
            _half(graph, head)
        elif precision == "int8":
            graph = _compress(graph, head)
        else:
            graph = _quantize(graph, head, calibration)
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


def _bound(graph: openvino.Model, longest: int) -> None:
    """Write the limit into the graph's inputs: no runtime may pad beyond it."""
    ov = need("openvino")
    shape = ov.PartialShape([ov.Dimension(-1), ov.Dimension(1, longest)])
    graph.reshape({i.any_name: shape for i in graph.inputs})


def _half(graph: openvino.Model, head: set[str]) -> None:
    """Weights in fp16, widened where they are used; the head's stay as they are."""
    ov = need("openvino")
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        users = node.output(0).get_target_inputs()
        if node.data.ndim < 2 or any(u.get_node().get_friendly_name() in head for u in users):
            continue
        # What is too small or too large for fp16: the probes decide whether that matters.
        with np.errstate(all="ignore"):
            half = ov.opset13.constant(node.data.astype(np.float16))
        wide = ov.opset13.convert(half, "f32")
        for user in users:
            user.replace_source_output(wide.output(0))


def _compress(graph: openvino.Model, head: set[str]) -> openvino.Model:
    """Weights and embedding tables in int8, each channel with a scale and a zero point."""
    nncf = need("nncf")
    with _quiet():
        compressed: openvino.Model = nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            ignored_scope=nncf.IgnoredScope(names=sorted(head)),
        )
    return compressed


def _quantize(graph: openvino.Model, head: set[str], calibration: Work) -> openvino.Model:
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
