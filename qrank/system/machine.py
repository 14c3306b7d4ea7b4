"""Facts about this machine, for the keys of proofs and measurements and for `qrank doctor`."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
from functools import cache
from pathlib import Path

from qrank.system import cgroups
from qrank.system.extras import find

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
"""Instruction set that affects the speed of quantized models -> its name on Linux."""


ROOT = Path("/")
"""Parent of the system's folders proc, sys and dev."""


def processors() -> int:
    """CPUs this process may use, by its affinity and its container's quota.

    Fractions are rounded up: with 1.5 CPUs, two threads get more done than one.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, _quota())


def _quota() -> int:
    """The container's CPU quota, at least 1; without a limit, more CPUs than any machine has."""
    return max(math.ceil(cgroups.cpus() or 2**16), 1)


@cache
def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first CPU; {} if there is no such file."""
    try:
        first = (ROOT / "proc/cpuinfo").read_text("utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def cpu_name() -> str:
    """The CPU's model name, if the system reports it."""
    info = _cpuinfo()
    if name := info.get("model name") or _apple_chip():
        return name
    name = platform.processor() or platform.machine()
    # Linux on ARM reports only numbers.
    part = ", ".join(f"{key.lower()} {info[key]}" for key in _ARM if key in info)
    return f"{name} ({part})" if part else name


_ARM = ("CPU implementer", "CPU variant", "CPU part")


def _apple_chip() -> str:
    """`Apple M4 Max`, say; "" on other systems, or if macOS does not report it."""
    if platform.system() != "Darwin":
        return ""
    text = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(text))
    name = b"machdep.cpu.brand_string"
    failed = ctypes.CDLL(None).sysctlbyname(name, text, ctypes.byref(size), None, 0)
    return "" if failed else text.value.decode()


def instruction_sets() -> list[str]:
    """Those of INSTRUCTION_SETS this CPU has; empty if the system does not report them.

    Linux does; on other systems an empty list does not prove absence.
    """
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags]


def x86() -> bool:
    """Whether this CPU is an x86: only those have products of bytes that may overflow."""
    return platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")


def has_vnni() -> bool:
    """Whether this x86 CPU has instructions that sum products of bytes in 32 bits.

    Without them, runtimes sum pairs of products in 16 bits, which can overflow. False also if the
    system does not report instruction sets.
    """
    return not {"VNNI", "AVX-VNNI"}.isdisjoint(instruction_sets())


def cores() -> int:
    """As `processors`, but each physical core counts once, if the system reports them."""
    if not hasattr(os, "sched_getaffinity"):
        return processors()
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = ROOT / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            siblings.add(path.read_text("ascii").strip())
        except OSError:
            return processors()
    return min(len(siblings), _quota())


@cache
def cpu() -> str:
    """A short identifier of this CPU and its instruction set, by which kernels differ."""
    info = _cpuinfo()
    # Not all of cpuinfo, since its clock changes; model and instruction set do not.
    text = cpu_name() + info.get("flags", info.get("Features", ""))
    return platform.machine() + "-" + hashlib.sha256(text.encode()).hexdigest()[:12]


def accelerators() -> list[str]:
    """GPUs and NPUs with their models, and NVIDIA's driver, as far as the system lists them.

    For example `dri/renderD128 8086:56a0` (PCI vendor and device ids), `NVIDIA H100 80GB HBM3`,
    `Apple M4 Max, 16 cores`.
    """
    found = []
    if chip := _apple_chip():
        # Chips of one name are sold with fewer cores, of the GPU too.
        found.append(f"{chip}, {os.cpu_count()} cores")
    for folder, kind in (("dri", "drm"), ("accel", "accel")):
        for node in sorted((ROOT / "dev" / folder).glob("*")):
            if node.name.startswith(("renderD", "accel")):
                device = ROOT / "sys/class" / kind / node.name / "device"
                numbers = (_line(device / name).removeprefix("0x") for name in ("vendor", "device"))
                found.append(f"{folder}/{node.name} {':'.join(numbers)}".rstrip(" :"))
    nvidia = ROOT / "proc/driver/nvidia"
    for information in sorted(nvidia.glob("gpus/*/information")):
        # "Model:           NVIDIA H100 80GB HBM3" comes first.
        found.append(_line(information).partition(":")[2].strip())
    return found + [driver for driver in [_line(nvidia / "version")] if driver]


def _line(path: Path) -> str:
    """A file's first line; "" if it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").partition("\n")[0].strip()
    except OSError:
        return ""


def system() -> str:
    """The operating system and its version, which also determines the drivers it comes with."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def packages(modules: tuple[str, ...]) -> list[str]:
    """Versions of the modules that are installed, like `onnxruntime-1.31.1`, without imports.

    Reads the names of their metadata folders: importlib.metadata would take the time that a cached
    measurement saves.
    """
    found = []
    for module in modules:
        spec = find(module)
        if spec is not None and spec.origin is not None:
            site = Path(spec.origin).parent.parent
            package = module.partition(".")[0]
            names = [path.name for path in site.glob(f"{package}*-info")]
            found += sorted(name.rpartition(".")[0] for name in names) or [module]
    return found


def memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's if smaller.

    None if the system does not report it.
    """
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    return min(whole, cgroups.memory() or whole)


def free_memory() -> int | None:
    """Bytes that this process can still use; None if the system does not report it (Linux does)."""
    try:
        lines = (ROOT / "proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    left = cgroups.free_memory()
    return min(free if left is None else [*free, left], default=None)


def peak_memory() -> int | None:
    """Peak memory of this process in bytes; None if the system does not report it.

    On Linux, getrusage's ru_maxrss is not used: in a child it starts at the parent's size.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text("utf-8").splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if platform.system() != "Darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
