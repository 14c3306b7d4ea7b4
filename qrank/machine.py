"""What this machine is: what proofs and measurements hold for, and what `qrank doctor` says."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from functools import cache
from pathlib import Path

INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "VNNI": "avx512_vnni",
    "AVX-VNNI": "avx_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX int8": "amx_int8",
    "AMX bf16": "amx_bf16",
    "NEON dot product": "asimddp",
    "NEON int8 matrices": "i8mm",
    "NEON bf16": "bf16",
    "SVE": "sve",
}
"""Those that decide how fast a quantized model is -> Linux's name."""


def processors() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first CPU; {} where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def cpu_name() -> str:
    """As its maker calls it, where the system tells."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of INSTRUCTION_SETS this CPU has; nothing where the system does not tell (Linux does).

    On other systems this is no proof of absence.
    """
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags]


def cores() -> int:
    """Processors this process may use, each physical core counted once where the system tells."""
    if not hasattr(os, "sched_getaffinity"):
        return processors()
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text("ascii").strip())
        except OSError:
            return processors()
    return len(siblings)


@cache
def cpu() -> str:
    """A short name of this CPU: kernels differ with its instruction set."""
    info = _cpuinfo()
    # The clock in this file changes; model and instruction set do not.
    text = (info.get("model name", "") + info.get("flags", info.get("Features", ""))) or cpu_name()
    return platform.machine() + "-" + hashlib.sha256(text.encode()).hexdigest()[:12]


def accelerators() -> list[str]:
    """Names of device nodes of GPUs and NPUs, and NVIDIA's driver: what the system shows."""
    found = [
        f"{folder.name}/{node.name}"
        for folder in (Path("/dev/dri"), Path("/dev/accel"))
        if folder.is_dir()
        for node in sorted(folder.iterdir())
        if node.name.startswith(("renderD", "accel"))
    ]
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        found.append(driver.read_text("utf-8", "replace").partition("\n")[0].strip())
    return found


def system() -> str:
    """The operating system with its version, which its own drivers come with."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def packages(modules: tuple[str, ...]) -> list[str]:
    """`onnxruntime-1.31.1`, ... of those modules that are installed, none of them imported.

    By the names of their folders: to ask importlib.metadata would cost the time that a remembered
    measurement saves.
    """
    found = []
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            site = Path(spec.origin).parent.parent
            names = [path.name for path in site.glob(f"{module}*-info")]
            found += sorted(name.rpartition(".")[0] for name in names) or [module]
    return found


def memory() -> int | None:
    """Bytes of memory in all; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def free_memory() -> int | None:
    """Bytes that programs can still take; None where the system does not tell (Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


def peak_memory() -> int | None:
    """Most bytes this process held; None where the system does not tell.

    On Linux not getrusage's ru_maxrss, which a child starts with its parent's size in.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text("utf-8").splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if platform.system() != "Darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
