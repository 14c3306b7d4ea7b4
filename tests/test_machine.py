"""Detection of the machine and of container limits, with fake files of Linux and macOS."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qrank import Reranker
from qrank.system import cgroups, machine

GB = 2**30
NONE_V1 = 9223372036854771712
"""The value in cgroups version 1 for unlimited memory."""

Fake = Callable[..., None]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 CPUs on 32 cores and 256 GB of memory, 200 GB of it free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    sizes = {"SC_PHYS_PAGES": 256 * GB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {200 * GB // 1024} kB\n")
    for cpu in range(64):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(tmp_path, f"{topology}/thread_siblings_list", f"{cpu % 32},{cpu % 32 + 32}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Fake control groups: lines of /proc/self/cgroup, mounts, and files by path."""

    def fake(own: list[str], mounts: list[str], files: dict[str, object]) -> None:
        write(tmp_path, "proc/self/cgroup", "\n".join(own))
        lines = ["22 27 0:21 / /proc rw,nosuid shared:12 - proc proc rw"]
        lines += [line.replace("AT", str(tmp_path / "at")) for line in mounts]
        write(tmp_path, "proc/self/mountinfo", "\n".join(lines))
        for name, content in files.items():
            write(tmp_path / "at", name, f"{content}\n")
        monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc/self")

    return fake


def write(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


V2 = ["30 23 0:26 / AT rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"]
V1 = [
    "32 31 0:29 / AT/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct",
    "35 31 0:32 / AT/memory rw,relatime - cgroup cgroup rw,memory",
    "36 31 0:33 / AT/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd",
]
RUN = "user.slice/user-1000.slice/user@1000.service/app.slice/run-r7\\x2d1.scope"

CASES: dict[str, tuple[list[str], list[str], dict[str, object]]] = {
    "a container, version 2": (
        ["0::/"],
        V2,
        {"cpu.max": "200000 100000", "memory.max": 2 * GB, "memory.current": GB // 2},
    ),
    "a container, version 1, its own group mounted": (
        ["4:memory:/docker/1f", "3:cpuset:/docker/1f", "1:cpu,cpuacct:/docker/1f"],
        [line.replace(" / AT", " /docker/1f AT") for line in V1],
        {
            "cpu,cpuacct/cpu.cfs_quota_us": 200_000,
            "cpu,cpuacct/cpu.cfs_period_us": 100_000,
            "memory/memory.limit_in_bytes": 2 * GB,
            "memory/memory.usage_in_bytes": GB // 2,
        },
    ),
    "systemd-run -p CPUQuota=200% -p MemoryMax=2G, version 2": (
        [f"0::/{RUN}"],
        V2,
        {f"{RUN}/cpu.max": "200000 100000", f"{RUN}/memory.max": 2 * GB}
        | {f"{RUN}/memory.current": GB // 2, "user.slice/memory.max": "max"},
    ),
    "its MemoryHigh, and a name that mountinfo escapes": (
        [f"0::/{RUN}"],
        [V2[0].replace(" / AT", f" /{RUN} AT/a\\040b".replace("\\x", "\\134x"))],
        {"a b/cpu.max": "100000 50000", "a b/memory.max": "max", "a b/memory.high": 2 * GB}
        | {"a b/memory.current": GB // 2},
    ),
    "of nested groups the smallest, version 2": (
        ["0::/outer/middle/inner"],
        V2,
        {"outer/cpu.max": "800000 100000", "outer/memory.max": 2 * GB}
        | {"outer/middle/cpu.max": "200000 100000", "outer/middle/memory.max": 4 * GB}
        | {"outer/middle/inner/cpu.max": "max 100000", "outer/middle/inner/memory.max": "max"}
        | {"outer/memory.current": GB // 2, "outer/middle/memory.current": GB // 4},
    ),
    "of nested groups the smallest, version 1 beside version 2": (
        ["4:memory:/outer/inner", "1:cpu,cpuacct:/outer/inner", "0::/outer/inner"],
        [*V1, V2[0].replace("AT", "AT/unified")],
        {
            "cpu,cpuacct/outer/cpu.cfs_quota_us": 400_000,
            "cpu,cpuacct/outer/cpu.cfs_period_us": 200_000,
            "cpu,cpuacct/outer/inner/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/outer/inner/cpu.cfs_period_us": 100_000,
            "memory/memory.limit_in_bytes": NONE_V1,
            "memory/outer/memory.limit_in_bytes": 2 * GB,
            "memory/outer/memory.usage_in_bytes": GB,
            "memory/outer/memory.stat": f"cache 9\ninactive_file 1\ntotal_inactive_file {GB // 2}",
            "memory/outer/inner/memory.limit_in_bytes": NONE_V1,
        },
    ),
    "another namespace's group": (
        ["0::/../../outside"],
        V2,
        {"cpu.max": "200000 100000", "memory.max": 2 * GB, "memory.current": GB // 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("large")
def test_of_64_cpus_and_256_gb_a_container_sees_2_and_2(groups: Fake, case: str) -> None:
    assert (machine.processors(), machine.cores()) == (64, 32)
    assert machine.memory() == 256 * GB
    groups(*CASES[case])
    assert (machine.processors(), machine.cores()) == (2, 2)
    assert machine.memory() == 2 * GB
    assert machine.free_memory() == 3 * GB // 2


@pytest.mark.usefixtures("large")
def test_a_reranker_in_a_container_takes_its_cpus(groups: Fake) -> None:
    with Reranker("mini", backend="fakes:length") as reranker:
        assert reranker.engine.threads == 64
    groups(*CASES["a container, version 2"])
    with Reranker("mini", backend="fakes:length") as reranker:
        assert reranker.engine.threads == 2


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        *(("50000 100000", 1), ("150000 100000", 2), ("9900000 100000", 64)),
        *(("max 100000", 64), ("100", 64), ("", 64), ("nonsense", 64)),
    ],
)
@pytest.mark.usefixtures("large")
def test_a_part_of_a_cpu_counts_as_one(groups: Fake, quota: str, expected: int) -> None:
    groups(["0::/"], V2, {"cpu.max": quota})
    assert machine.processors() == expected
    assert machine.cores() == min(expected, 32)


@pytest.mark.usefixtures("large")
def test_without_limits_or_control_groups_there_is_what_the_machine_has(groups: Fake) -> None:
    nothing = {"memory/memory.limit_in_bytes": NONE_V1, "cpu,cpuacct/cpu.cfs_quota_us": -1}
    for case in (
        (["0::/"], V2, {}),
        (["4:memory:/", "1:cpu,cpuacct:/"], V1, nothing),
        ([], [], {}),
    ):
        groups(*case)
        assert (machine.processors(), machine.cores()) == (64, 32)
        assert (machine.memory(), machine.free_memory()) == (256 * GB, 200 * GB)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_process_bound_to_one_cpu_sees_one() -> None:
    code = (
        "import os\nfrom qrank.system import machine\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "assert (machine.processors(), machine.cores()) == (1, 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Names that tell chips apart


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty root folder for another machine's files."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    for remembered in (machine._cpuinfo, machine.cpu):
        remembered.cache_clear()
    yield tmp_path
    for remembered in (machine._cpuinfo, machine.cpu):
        remembered.cache_clear()


def test_apples_chips_are_told_apart(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls all of them "arm"."""

    class Libc:
        chip = b""

        def sysctlbyname(self, name: bytes, text: Any, size: Any, new: None, count: int) -> int:
            assert (name, new, count) == (b"machdep.cpu.brand_string", None, 0)
            text.value = self.chip
            return 0 if self.chip else -1

    libc = Libc()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    names = {}
    for libc.chip in (b"Apple M1", b"Apple M4 Max", b""):
        machine.cpu.cache_clear()
        names[machine.cpu_name()] = machine.cpu()
    assert list(names) == ["Apple M1", "Apple M4 Max", "arm"]
    assert len(set(names.values())) == 3
    assert machine.accelerators() == []
    libc.chip = b"Apple M4 Max"
    gpus = set()
    for cores in (14, 16):
        monkeypatch.setattr(os, "cpu_count", partial(int, cores))
        gpus |= set(machine.accelerators())
    assert gpus == {"Apple M4 Max, 14 cores", "Apple M4 Max, 16 cores"}


def test_arms_chips_are_told_apart_on_linux(elsewhere: Path) -> None:
    """Two chips with the same instruction sets, and no file that names them."""
    names = set()
    for part in ("0xd40", "0xd4f"):
        text = f"processor : 0\nFeatures : fp asimd\nCPU implementer : 0x41\nCPU part : {part}\n\n"
        write(elsewhere, "proc/cpuinfo", text)
        machine._cpuinfo.cache_clear()
        machine.cpu.cache_clear()
        assert f"cpu implementer 0x41, cpu part {part}" in machine.cpu_name()
        names.add(machine.cpu())
    assert len(names) == 2


def test_gpus_are_told_by_their_models(elsewhere: Path) -> None:
    assert machine.accelerators() == []
    for name in ("dri/card0", "dri/renderD128", "dri/renderD129", "accel/accel0"):
        write(elsewhere, f"dev/{name}", "")
    write(elsewhere, "sys/class/drm/renderD128/device/vendor", "0x8086\n")
    write(elsewhere, "sys/class/drm/renderD128/device/device", "0x56a0\n")
    write(elsewhere, "proc/driver/nvidia/version", "NVRM version: 580.1\nGCC version: 12\n")
    about = "proc/driver/nvidia/gpus/0000:01:00.0/information"
    write(elsewhere, about, "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 11\n")
    assert machine.accelerators() == [
        "dri/renderD128 8086:56a0",
        "dri/renderD129",
        "accel/accel0",
        "NVIDIA H100 80GB HBM3",
        "NVRM version: 580.1",
    ]
