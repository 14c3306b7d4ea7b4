"""What qrank remembers in its cache folder, a file a record, and what clears it.

A record is found by its kind and its key: everything it holds for. So a new runtime, driver or
qrank finds none, processes that write at the same time write files of their own, and one damaged
file is one record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qrank.system import paths

KINDS = {
    "hashes": "files that are what their bundle says",
    "proofs": "targets held against their bundle's probes",
    "measurements": "speeds of targets (qrank tune)",
    "losses": "nDCG@10 that variants lose (qrank eval)",
    "logits": "logits of scored queries (qrank eval)",
    "openvino": "graphs that OpenVINO compiled",
}
"""Folders of the cache, and what lies there."""

Key = Mapping[str, Any]
"""What a record holds for: anything JSON can hold."""

Record = TypeVar("Record")

log = logging.getLogger("qrank")


def load(kind: str, key: Key, read: Callable[..., Record]) -> Record | None:
    """The record of a key; None where there is none.

    A file that cannot be read, or that another version of qrank wrote, is told of and ignored.

    Args:
        kind: of the record.
        key: all that it holds for.
        read: makes the record of its fields; raises TypeError, ValueError or KeyError where they
            are not what it takes.
    """
    path = place(kind, key, ".json")
    if path is None:
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["key"] != _plain(key):
            raise ValueError("it is another record's")
        return read(**content["record"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        ignore(path, f"{type(error).__name__}: {error}")
        return None


def store(kind: str, key: Key, record: Mapping[str, Any]) -> None:
    """Keep a record, where there is a cache."""
    path = place(kind, key, ".json")
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomically(path, json.dumps({"key": _plain(key), "record": record}))
    except OSError as error:
        log.info("not remembered: %s", error)


def place(kind: str, key: Key, suffix: str = "") -> Path | None:
    """Where what belongs to a key lies; None where there is no cache. It need not exist."""
    folder = paths.cache_folder()
    if folder is None:
        return None
    canonical = json.dumps(key, sort_keys=True)
    return folder / kind / f"{hashlib.sha256(canonical.encode()).hexdigest()[:32]}{suffix}"


def ignore(path: Path, reason: str) -> None:
    """Say that a file of the cache is of no use."""
    log.warning("ignoring %s, which is damaged or another version's (%s)", path, reason)


@dataclass(frozen=True)
class Usage:
    """What lies in the cache of one kind: records, and their bytes."""

    records: int
    bytes: int


def usage() -> dict[str, Usage]:
    """Kind -> what lies in the cache."""
    folder = paths.cache_folder()
    found = {}
    for kind in KINDS:
        place = None if folder is None else folder / kind
        inside = [] if place is None or not place.is_dir() else list(place.iterdir())
        files = [f for x in inside for f in ([x] if x.is_file() else x.rglob("*"))]
        found[kind] = Usage(len(inside), sum(f.stat().st_size for f in files if f.is_file()))
    return found


def clear(kind: str) -> None:
    """Remove everything of a kind.

    Raises:
        OSError: it cannot be removed.
    """
    folder = paths.cache_folder()
    if folder is not None and (folder / kind).exists():
        shutil.rmtree(folder / kind)


def _plain(key: Key) -> Any:
    """A key as it comes back from JSON."""
    return json.loads(json.dumps(key))
