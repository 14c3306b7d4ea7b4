"""Cache keys for `qrank.system.cache`; all but those of file hashes are built here.

| kind | function | valid for |
|---|---|---|
| proofs | `of_run` | a variant as it runs here, the probes, and how it was asked to run |
| logits | `of_run` | a variant as it runs here, how it runs and reads; threads do not matter |
| losses | `of_run` | a variant as it runs here on a device with its format's own backend |
| measurements | `of_machine` | the whole bundle, all runtimes and devices here, the threads |
| openvino | `of_graph` | a variant's files, the runtime, the CPU, and how its graph was compiled |
| openvino | `of_files` | a variant's files; for other devices OpenVINO adds these and its version |

"A variant as it runs here" means its files and family (`Manifest.identity`), and `conditions`. So
adding or removing other variants does not matter, except for measurements, which compare them. The
key of a file hash is its path, and `Bundle.check` compares the rest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qrank.backends import BACKENDS, entry_points, spec
from qrank.bundle.manifest import Manifest, Variant
from qrank.system import machine
from qrank.system.extras import find
from qrank.system.frozen import frozen
from qrank.system.version import __version__


def of_run(
    manifest: Manifest, variant: Variant, backend: str, device: str, **how: Any
) -> dict[str, Any]:
    """The key of results of a variant on a device.

    Args:
        manifest: the bundle's.
        variant: of the bundle.
        backend: that runs it.
        device: lower case.
        how: everything else that affects the result, as JSON values.
    """
    return {"variant": manifest.identity(variant), **how, **conditions(backend, device)}


def of_machine(manifest: Manifest, **how: Any) -> dict[str, Any]:
    """The key of comparisons of all variants, backends and devices; `how` as for `of_run`."""
    return {
        "bundle": manifest.digest,
        "qrank": __version__,
        "cpu": machine.cpu(),
        **_cards(),
        "runtimes": {name: runtime(name) for name in BACKENDS},
        **how,
    }


def of_files(variant: Variant) -> dict[str, Any]:
    """The key of results that depend only on a variant's files."""
    return {"files": [record.sha256 for record in variant.files.values()]}


def of_graph(variant: Variant, backend: str, **how: Any) -> dict[str, Any]:
    """The key of a variant's graph that a backend's runtime compiled for this CPU."""
    return {**of_files(variant), "runtime": runtime(backend), "cpu": machine.cpu(), **how}


def of_card(variant: Variant, backend: str, device: str, **how: Any) -> dict[str, Any]:
    """The key of what a backend's runtime built of a variant for a card; `how` as for `of_run`."""
    return {**of_files(variant), "runtime": runtime(backend), "device": device, **_cards(), **how}


def conditions(name: str, device: str) -> dict[str, Any]:
    """The conditions under which results of a backend on a device stay valid, as JSON values.

    They are qrank's version, the installed runtime, the CPU, and for other devices the system with
    its drivers and accelerators. No runtime is imported to find them.

    Args:
        name: of a backend; changes to a user's own function are not detected.
        device: lower case.
    """
    found: dict[str, Any] = {
        "qrank": __version__,
        "backend": name,
        "runtime": runtime(name),
        "cpu": machine.cpu(),
        "device": device,
    }
    if device != "cpu":
        found |= _cards()
    return found


def _cards() -> dict[str, Any]:
    # A number names one of the visible cards.
    visible = {name: os.environ.get(name) for name in _VISIBLE if name in os.environ}
    return {"system": machine.system(), "accelerators": machine.accelerators(), **visible}


_VISIBLE = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""Variables that say which of NVIDIA's cards a process sees, and in which order."""


def runtime(name: str) -> list[str]:
    """Versions and install times of a backend's packages: some are compiled on installation."""
    if name not in BACKENDS:
        found = (point.dist for point in entry_points(tuple(sys.path)) if point.name == name)
        return sorted(f"{dist.name}-{dist.version}" for dist in found if dist)
    modules = spec(name).modules
    files = [found.origin for found in map(find, modules) if found]
    if frozen():  # no files: they are in the application, and change with it
        files = [sys.executable] if files else []
    times = [str(Path(file).stat().st_mtime_ns) for file in files if file]
    return machine.packages(modules) + times
