"""Compiled OpenVINO graphs in the cache folder: later starts load what an earlier one compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.system import cache

if TYPE_CHECKING:
    import openvino


def compile_or_load(
    core: openvino.Core, model: openvino.Model, settings: Mapping[str, Any], place: Path | None
) -> openvino.CompiledModel:
    """Compile a graph for the CPU, or load it if it was compiled before.

    Args:
        core: where it runs.
        model: the graph.
        settings: OpenVINO's properties.
        place: folder of this graph with these settings, which need not exist; None: not kept.

    Raises:
        RuntimeError: OpenVINO cannot compile it.
    """
    return cache.built(
        place, lambda folder: core.compile_model(model, "CPU", {**settings, **_kept_in(folder)})
    )


def _kept_in(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    # OPTIMIZE_SIZE leaves out the weights, and the CPU plugin (2026.4) then never loads what it
    # wrote: it compiles again, and writes again, at every start.
    return {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SPEED"}
