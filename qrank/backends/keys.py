"""What a remembered thing holds for: the keys of `qrank.system.cache`, put together here alone.

| kind | function | holds for |
|---|---|---|
| proofs | `of_run` | a variant as it runs here, the probes, and how it was asked to run |
| logits | `of_run` | a variant as it runs here, how it runs and reads; threads change none |
| losses | `of_run` | a variant as it runs here on a device by its format's own backend |
| measurements | `of_machine` | all of a bundle, all runtimes and devices here, the threads |
| openvino | `of_files` | a variant's files; OpenVINO itself adds the device and its version |

"A variant as it runs here" is its files and family (`Manifest.identity`), and `conditions`. So
other variants may come and go, but for measurements, which compare them. Of hashes the key is a
path, and `Bundle.check` compares the rest.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from qrank.backends import BACKENDS, entry_points, spec
from qrank.bundle.manifest import Manifest, Variant
from qrank.system import machine
from qrank.system.version import __version__


def of_run(
    manifest: Manifest, variant: Variant, backend: str, device: str, **how: Any
) -> dict[str, Any]:
    """The key of what a variant does on a device.

    Args:
        manifest: of the bundle.
        variant: of it.
        backend: what runs it.
        device: lower case.
        how: whatever else decides; as JSON can hold it.
    """
    return {"variant": manifest.identity(variant), **how, **conditions(backend, device)}


def of_machine(manifest: Manifest, **how: Any) -> dict[str, Any]:
    """The key of what compares all variants, backends and devices; `how` as for `of_run`."""
    return {
        "bundle": manifest.digest,
        "qrank": __version__,
        "cpu": machine.cpu(),
        "system": machine.system(),
        "accelerators": machine.accelerators(),
        "runtimes": {name: runtime(name) for name in BACKENDS},
        **how,
    }


def of_files(variant: Variant) -> dict[str, Any]:
    """The key of what was made of a variant's files alone."""
    return {"files": [record.sha256 for record in variant.files.values()]}


def conditions(name: str, device: str) -> dict[str, Any]:
    """What anything found out about a backend on a device holds for, as JSON can hold it.

    This qrank, the runtime as it is installed, the CPU, and for other devices the system with its
    drivers and what the device is. All is told without importing a runtime.

    Args:
        name: of a backend; of a user's own nothing tells when it changes.
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
        found |= {"system": machine.system(), "accelerators": machine.accelerators()}
    return found


def runtime(name: str) -> list[str]:
    """Versions of a backend's packages, and when they were installed: some are compiled there."""
    if name not in BACKENDS:
        found = (point.dist for point in entry_points(tuple(sys.path)) if point.name == name)
        return sorted(f"{dist.name}-{dist.version}" for dist in found if dist)
    modules = spec(name).modules
    files = [found.origin for found in map(importlib.util.find_spec, modules) if found]
    times = [str(Path(file).stat().st_mtime_ns) for file in files if file]
    return machine.packages(modules) + times
