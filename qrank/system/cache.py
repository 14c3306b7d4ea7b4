"""Records in qrank's cache folder, one file per record, and functions that clear them.

A record is found by its kind and key; the key is everything the record depends on. So a new
runtime, driver or qrank finds no record, processes that write different records at the same time
do not conflict, and a damaged file costs only one record.
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
    "tensorrt": "engines that TensorRT built",
}
"""Folder of the cache -> description of its contents."""

Key = Mapping[str, Any]
"""Everything a record depends on, as JSON values."""

Record = TypeVar("Record")
Built = TypeVar("Built")

log = logging.getLogger("qrank")


def load(kind: str, key: Key, read: Callable[..., Record]) -> Record | None:
    """The record of a key; None if there is none.

    A file that cannot be read, or that another version of qrank wrote, is ignored with a warning.

    Args:
        kind: kind of the record.
        key: everything it depends on.
        read: makes the record from its fields; raises TypeError, ValueError or KeyError if they
            are invalid.
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
    """Store a record, if there is a cache."""
    path = place(kind, key, ".json")
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomically(path, json.dumps({"key": _plain(key), "record": record}))
    except OSError as error:
        log.info("not remembered: %s", error)


def place(kind: str, key: Key, suffix: str = "") -> Path | None:
    """Path of a key's file or folder, which need not exist; None if there is no cache."""
    folder = paths.cache_folder()
    if folder is None:
        return None
    canonical = json.dumps(key, sort_keys=True)
    return folder / kind / f"{hashlib.sha256(canonical.encode()).hexdigest()[:32]}{suffix}"


def built(place: Path | None, build: Callable[[Path | None], Built]) -> Built:
    """Build something that writes files to load later, or load it if it was built before.

    Args:
        place: folder of these files, which need not exist; None: they are not kept.
        build: called with the folder to load from if it exists, or else to write to; None: neither.
    """
    # Imported here: importing qrank does not need it.
    from tempfile import TemporaryDirectory

    if place is None or place.exists():
        return build(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(prefix=".", dir=place.parent)
    except OSError as error:
        log.info("%s is not kept: %s", place.name, error)
        return build(None)
    with temporary as folder:
        # Runtimes write into files that other processes read, which may have them mapped. So they
        # write elsewhere, and the whole folder is put in place at once.
        own = Path(folder) / "built"
        own.mkdir()
        made = build(own)
        if any(own.iterdir()):
            try:
                own.rename(place)
            except OSError as error:
                log.info("another process was first: %s", error)
    return made


def ignore(path: Path, reason: str) -> None:
    """Warn that a cache file is unusable and ignored."""
    log.warning("ignoring %s, which is damaged or another version's (%s)", path, reason)


@dataclass(frozen=True)
class Usage:
    """Number and total bytes of the cached records of one kind."""

    records: int
    bytes: int


def usage() -> dict[str, Usage]:
    """Kind -> its usage of the cache."""
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
    """A key after a round trip through JSON."""
    return json.loads(json.dumps(key))
