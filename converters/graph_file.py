"""ONNX graphs on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.extras import need

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
