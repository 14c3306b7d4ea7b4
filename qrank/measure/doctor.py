"""What `qrank doctor` finds: every backend and device, checked by computing something there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from qrank.backends import BACKENDS, RUNTIMES, llama, module, others
from qrank.errors import QrankError
from qrank.measure.discover import start, survey
from qrank.system import machine
from qrank.system.extras import EXTRA_OF, installed, pip_line

LIMIT = 60.0
"""Seconds a backend may take to say what is there, and a device to compute."""

EXACT = 0.05
"""Largest difference from numpy's that a product of fp32 matrices may have: devices may compute it
in 16 bits, and of numbers like these that costs 0.02."""


@dataclass(frozen=True)
class DeviceReport:
    """A device of a backend.

    Attributes:
        name: lower case.
        present: whether the backend finds it here.
        computes: whether it gave the right product of two matrices; None: not asked.
        detail: what it can compute in; or why it cannot be used.
    """

    name: str
    present: bool
    computes: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class BackendReport:
    """A backend.

    Attributes:
        name: of the backend.
        version: of its runtime; None where it cannot be used.
        reason: why not; "" where it can.
        advice: what to do about that; "" where nothing is to be done.
        devices: present ones, and others that it might have.
    """

    name: str
    version: str | None
    reason: str = ""
    advice: str = ""
    devices: list[DeviceReport] = field(default_factory=list)


def examine(progress: Callable[[str], object] = lambda step: None) -> dict[str, Any]:
    """Look at this machine, its backends and their devices; nothing of it can end this process.

    Returns:
        What JSON can hold: "machine", and "backends" as `BackendReport` has them.
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
    own = name in BACKENDS
    if own and not installed(RUNTIMES[name]):
        # Only "torch" is an extra of its own and one of convert's parts.
        extra = "torch" if name == "torch" else EXTRA_OF[RUNTIMES[name]]
        return BackendReport(name, None, f"{RUNTIMES[name]} is not installed", pip_line(extra))
    found = survey(name, LIMIT)
    if found.reason is not None:
        advice = f"reinstall it: {pip_line(EXTRA_OF[RUNTIMES[name]])}" if own else ""
        return BackendReport(name, None, found.reason, advice)
    devices = [
        _device(name, device.name, [e for e in device.compute_dtypes if e])
        for device in found.devices
    ]
    if own:
        kinds = {device.name.partition(".")[0] for device in devices}
        absent = [kind for kind in module(name).DEVICES if kind not in kinds]
        devices += [DeviceReport(kind, present=False) for kind in absent]
    return BackendReport(name, found.version, advice=_conflict(name), devices=devices)


def _device(backend: str, device: str, compute_dtypes: list[str]) -> DeviceReport:
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
    return DeviceReport(device, True, True, ", ".join(compute_dtypes) or _note(backend, device))


def _note(backend: str, device: str) -> str:
    """What a user may want to know of a device that computes."""
    if (backend, device) == ("gguf", "cpu") and not llama.rearranges():
        return "without AMX, whose kernels crash: llama.cpp issue 20824"
    return ""


def _conflict(backend: str) -> str:
    """onnxruntime's builds share a folder: of two, the one installed last runs."""
    builds = machine.packages(("onnxruntime",)) if backend == "onnx" else []
    if len(builds) < 2:
        return ""
    return f"{' and '.join(builds)} overwrite each other: uninstall all, install one"
