"""ONNX graphs on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    import onnx

_LARGEST_PROTO = 2**31 - 2**20
"""Protocol buffers end at 2 GiB: larger weights go into a file beside the graph."""


def fits(size: int) -> bool:
    """Whether weights of so many bytes go into a graph's own file."""
    return size <= _LARGEST_PROTO


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with `NAME.data` beside it where its weights are larger than 2 GB."""
    size = sum(len(i.raw_data) for i in model.graph.initializer)
    options: dict[str, Any] = {}
    if not fits(size):
        options = {"save_as_external_data": True, "location": f"{path.name}.data"}
    need("onnx").save(model, str(path), **options)


def load_graph(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read a graph, with the weights that lie in other files beside it.

    The graph and these files may be symbolic links, as in huggingface_hub's cache and on big disks:
    onnx itself refuses those, as a link may lead to a secret. Nothing of a bundle is given away by
    who makes it, and a graph can name no files but those below its folder.

    Args:
        path: the graph's.
        weights: read what lies in other files.

    Raises:
        ConversionError: it names a file outside its folder, or one that is missing or cut off.
        Exception: what onnx and protobuf raise of a file that is no graph; they share no base.
    """
    model: onnx.ModelProto = need("onnx").load(path, load_external_data=False)
    for tensor in _tensors(model) if weights else ():
        if tensor.data_location == tensor.EXTERNAL:
            tensor.raw_data = _external(tensor, path)
            tensor.data_location = tensor.DEFAULT
            del tensor.external_data[:]
    return model


def _external(tensor: onnx.TensorProto, graph: Path) -> bytes:
    """The bytes of a tensor that lie in a file beside its graph."""
    entry = {item.key: item.value for item in tensor.external_data}
    location = PurePosixPath(entry.get("location", ""))
    if location.is_absolute() or ".." in location.parts or not location.name:
        raise ConversionError(
            f"{graph} has weights in {str(location)!r}; a file below its own folder was expected"
        )
    # Where a link leads to the graph, they may lie beside either.
    places = [graph.parent / location, graph.resolve().parent / location]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ConversionError(f"{graph} has weights in {location}, and there is no {places[0]}")
    with file.open("rb") as opened:
        opened.seek(int(entry.get("offset", 0)))
        length = int(entry.get("length", -1))
        found = opened.read(length)
    if length > len(found):
        raise ConversionError(
            f"{file} is cut off: {tensor.name} has {len(found):,} bytes there of {length:,}"
        )
    return found


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph and of the graphs and functions within it."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            inner = [attribute.g] if attribute.HasField("g") else []
            for graph in (*inner, *attribute.graphs):
                yield from _of_graph(graph)
