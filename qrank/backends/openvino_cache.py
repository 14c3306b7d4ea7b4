"""Compiled OpenVINO graphs in the cache folder: later starts load what an earlier one compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

log = logging.getLogger("qrank")


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
    # Imported here: importing qrank does not need it.
    from tempfile import TemporaryDirectory

    if place is None:
        return core.compile_model(model, "CPU", settings)
    if place.exists():
        return core.compile_model(model, "CPU", {**settings, **_kept_in(place)})
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(prefix=".", dir=place.parent)
    except OSError as error:
        log.info("the compiled graph is not kept: %s", error)
        return core.compile_model(model, "CPU", settings)
    with temporary as folder:
        # OpenVINO writes into the file that other processes read, which may have it mapped. So it
        # writes elsewhere, and the whole folder is put in place at once.
        own = Path(folder) / "graph"
        made = core.compile_model(model, "CPU", {**settings, **_kept_in(own)})
        if own.is_dir() and any(own.iterdir()):
            try:
                own.rename(place)
            except OSError as error:
                log.info("another process was first: %s", error)
    return made


def _kept_in(folder: Path) -> dict[str, str]:
    # OPTIMIZE_SIZE leaves out the weights, and the CPU plugin (2026.4) then never loads what it
    # wrote: it compiles again, and writes again, at every start.
    return {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SPEED"}
