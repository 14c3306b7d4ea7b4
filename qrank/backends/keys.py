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
from pathlib import Path
from typing import Any

from qrank.backends import GROUP, RUNTIMES
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
        "runtimes": {name: runtime(name) for name in RUNTIMES},
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
    if name not in RUNTIMES:
        from importlib import metadata

        points = metadata.entry_points(group=GROUP, name=name)
        return sorted(f"{point.dist.name}-{point.dist.version}" for point in points if point.dist)
    modules = (RUNTIMES[name],) if name != "torch" else ("torch", "transformers")
    found = machine.packages(modules)
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            found.append(str(Path(spec.origin).stat().st_mtime_ns))
    return found
