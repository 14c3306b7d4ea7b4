"""Check every backend and device by computing something there, for `qrank doctor`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from qrank.backends import BACKENDS, kind, others, spec
from qrank.errors import QrankError
from qrank.measure.discover import Device, start, survey
from qrank.system import machine

LIMIT = 60.0
"""Seconds a backend may take to list its devices, and a device to compute."""

EXACT = 0.05
"""Largest allowed difference of a product of fp32 matrices from numpy's: devices may compute it in
16 bits, which costs 0.02 for such numbers."""


@dataclass(frozen=True)
class DeviceReport:
    """A device of a backend.

    Attributes:
        name: lower case.
        present: whether the backend finds it here.
        computes: whether its product of two matrices was right; None: not checked.
        detail: its compute dtypes, or else a note; or why it cannot be used or checked.
    """

    name: str
    present: bool
    computes: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class BackendReport:
    """A backend.

    Attributes:
        name: name of the backend.
        version: version of its runtime; None if it cannot be used.
        reason: why it cannot be used; "" if it can.
        advice: what to do about it, or about a conflict in its installation; "" if nothing.
        devices: present devices, and one entry for each kind that is absent.
    """

    name: str
    version: str | None
    reason: str = ""
    advice: str = ""
    devices: list[DeviceReport] = field(default_factory=list)


def examine(progress: Callable[[str], object] = lambda step: None) -> dict[str, Any]:
    """Report on this machine, its backends and their devices; a crash cannot end this process.

    Returns:
        JSON values: "machine", and "backends" with the fields of `BackendReport`.
    """
    progress("looking for backends and devices")
    with ThreadPoolExecutor(2) as pool:
        backends = list(pool.map(_backend, [*BACKENDS, *others()]))
    return {
        "machine": {
            "system": machine.system(),
            "cpu": machine.cpu_name(),
            "processors": machine.processors(),
            "cores": machine.cores(),
            "instruction_sets": machine.instruction_sets(),
            "memory": machine.memory(),
            "accelerators": machine.accelerators(),
        },
        "backends": [asdict(backend) for backend in backends],
    }


def _backend(name: str) -> BackendReport:
    # Another package's backend may crash on import: `survey` imports it in a child.
    own = spec(name) if name in BACKENDS else None
    if own is not None and (missing := own.missing()) is not None:
        return BackendReport(name, None, f"{missing} is not installed", own.pip_line)
    found = survey(name, LIMIT)
    if found.reason is not None:
        advice = f"reinstall it: {own.pip_line}" if own is not None else ""
        return BackendReport(name, None, found.reason, advice)
    devices = [_device(name, device) for device in found.devices]
    kinds = {kind(device.name) for device in devices}
    devices += [DeviceReport(name, present=False) for name in found.kinds if name not in kinds]
    return BackendReport(name, found.version, advice=found.conflict, devices=devices)


def _device(backend: str, found: Device) -> DeviceReport:
    device = found.name
    asked = start()
    try:
        off = asked.ask({"do": "check", "backend": backend, "device": device}, LIMIT)["off"]
    except QrankError as error:
        asked.close(kill=True)
        return DeviceReport(device, True, False, str(error))
    asked.close()
    if off is None:
        return DeviceReport(device, True, None, "has no check of its own")
    if off > EXACT:
        return DeviceReport(device, True, False, f"a product of matrices is off by {off:.3g}")
    compute_dtypes = [name for name in found.compute_dtypes if name]
    return DeviceReport(device, True, True, ", ".join(compute_dtypes) or found.note)
