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
"""Protocol buffers are limited to 2 GiB: larger weights go into a file next to the graph."""


def fits(size: int) -> bool:
    """Whether weights of `size` bytes fit into the graph's own file."""
    return size <= _LARGEST_PROTO


def save_graph(model: onnx.ModelProto, path: Path, weights: str = "{name}.data") -> None:
    """Write a graph; weights larger than 2 GB go into a file next to it, called `weights`."""
    size = sum(len(i.raw_data) for i in model.graph.initializer)
    options: dict[str, Any] = {}
    if not fits(size):
        options = {"save_as_external_data": True, "location": weights.format(name=path.name)}
    need("onnx").save(model, str(path), **options)


def load_graph(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read a graph with its external weights.

    The graph and its weight files may be symbolic links, as in huggingface_hub's cache and on big
    disks. onnx itself refuses links because one may lead to a secret. Here that is acceptable:
    making a bundle discloses nothing, and a graph can name only files below its folder.

    Args:
        path: the graph's file.
        weights: also read the weights in other files.

    Raises:
        ConversionError: the graph names a file outside its folder, or one that is missing or
            truncated.
        Exception: what onnx and protobuf raise if the file is not a graph; they share no base.
    """
    model: onnx.ModelProto = need("onnx").load(path, load_external_data=False)
    for tensor in _tensors(model) if weights else ():
        if tensor.data_location == tensor.EXTERNAL:
            tensor.raw_data = _external(tensor, path)
            tensor.data_location = tensor.DEFAULT
            del tensor.external_data[:]
    return model


def _external(tensor: onnx.TensorProto, graph: Path) -> bytes:
    """The bytes of a tensor stored in a file next to its graph."""
    entry = {item.key: item.value for item in tensor.external_data}
    location = PurePosixPath(entry.get("location", ""))
    if location.is_absolute() or ".." in location.parts or not location.name:
        raise ConversionError(
            f"{graph} has weights in {str(location)!r}; a file below its own folder was expected"
        )
    # If the graph is a link, the weights may lie next to the link or next to its target.
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
    """Every tensor of a model, including nested graphs and functions."""
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
