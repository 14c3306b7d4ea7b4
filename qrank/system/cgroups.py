"""Limits of Linux's control groups, versions 1 and 2, on a container's CPUs and memory.

A process is in one group of each hierarchy, and each parent of that group limits it too: the
smallest limit counts. Limits may change at any time, so nothing is cached; all files are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
"""Files of a group's limits, in bytes. Above memory.high, processes are slowed but not killed."""

_USED = ("memory.current", "memory.usage_in_bytes")

_DROPPABLE = ("inactive_file", "total_inactive_file")
"""Lines of memory.stat: bytes of file cache, which count as used but can be reclaimed."""


def cpus() -> float | None:
    """CPU time that this process may use, in CPUs; None without a limit."""
    shares = []
    for group in _groups("cpu"):
        both = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        quota, *period = _words(group / "cpu.max") or both or ["max"]
        # Without a limit the quota is "max" or -1.
        if quota.isdigit() and period:
            shares.append(int(quota) / int(period[0]))
    return min(shares, default=None)


def memory() -> int | None:
    """Bytes that this process and others in its groups may use; None without a limit."""
    limits = (_limit(group) for group in _groups("memory"))
    return min((limit for limit in limits if limit is not None), default=None)


def free_memory() -> int | None:
    """Bytes of `memory` that are not used; None without a limit."""
    left = []
    for group in _groups("memory"):
        if (limit := _limit(group)) is not None:
            used = sum(_number(group / name) or 0 for name in _USED)
            stat = _words(group / "memory.stat")
            pairs = zip(stat[::2], stat[1::2], strict=False)
            # Version 1 has the group's own files and, with "total_", also those of its subgroups.
            droppable = max((int(n) for name, n in pairs if name in _DROPPABLE), default=0)
            left.append(max(limit - used + droppable, 0))
    return min(left, default=None)


def _limit(group: Path) -> int | None:
    limits = (_number(group / name) for name in _LIMITS)
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups whose controller may limit this process, the innermost first."""
    # "4:memory:/docker/1f" in version 1, "0::/user.slice/run-7.scope" in version 2.
    entries = [line.split(":", 2) for line in _lines(PROC / "cgroup")]
    own = {name: path for _, names, path in entries for name in names.split(",")}
    for line in _lines(PROC / "mountinfo"):
        # "30 23 0:26 ROOT PLACE rw shared:9 - cgroup2 cgroup2 rw,nsdelegate"
        where, _, what = line.partition(" - ")
        kind, _, options = (*what.split(), "", "", "")[:3]
        name = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if name not in own or (name and name not in options.split(",")):
            continue
        root, place = (_unescaped(text) for text in where.split()[3:5])
        path = PurePosixPath(own[name])
        # In a container, its own group may be mounted as the root of the hierarchy.
        inner = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        if ".." in inner.parts:  # a group in another namespace
            inner = PurePosixPath()
        yield from (Path(place, part) for part in (inner, *inner.parents))


def _unescaped(text: str) -> str:
    r"""A path from mountinfo, where a space is written as \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []  # another system, or a hierarchy without this controller


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none, or if the file says "max"."""
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None
