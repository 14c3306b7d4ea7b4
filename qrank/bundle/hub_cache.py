"""What huggingface_hub's cache holds: bundles, and the checkpoints that bundles were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qrank.bundle.manifest import MANIFEST
from qrank.errors import ModelNotFoundError

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo


@dataclass(frozen=True)
class Cached:
    """A bundle in the cache.

    Attributes:
        repository: `owner/name`.
        commit: on the hub.
        refs: branches and tags that point to the commit, as far as the cache knows.
        folder: of its files.
        bytes: size of the files that were downloaded.
    """

    repository: str
    commit: str
    refs: frozenset[str]
    folder: Path
    bytes: int

    @property
    def name(self) -> str:
        """`owner/name`, or with a branch or tag, or else the commit: `owner/name@v1.0`."""
        if "main" in self.refs:
            return self.repository
        return f"{self.repository}@{min(self.refs, default=self.commit)}"


def cached() -> list[Cached]:
    """The bundles in the cache, by name."""
    found = [
        Cached(repo.repo_id, rev.commit_hash, rev.refs, rev.snapshot_path, rev.size_on_disk)
        for repo in _scan().repos
        if repo.repo_type == "model"
        for rev in repo.revisions
        if any(file.file_path == rev.snapshot_path / MANIFEST for file in rev.files)
    ]
    return sorted(found, key=lambda each: each.name)


def size(repository: str) -> int:
    """Bytes that a model's repository takes in the cache; 0 if it is not there."""
    models = (repo for repo in _scan().repos if repo.repo_type == "model")
    return sum(repo.size_on_disk for repo in models if repo.repo_id == repository)


def remove(name: str) -> None:
    """Remove a bundle from the cache; files that other revisions share stay.

    Args:
        name: as in `Cached.name`, or `owner/name@COMMIT`.

    Raises:
        ModelNotFoundError: it is not there.
    """
    commits = [b.commit for b in cached() if name in (b.name, f"{b.repository}@{b.commit}")]
    if not commits:
        raise ModelNotFoundError(f"there is no bundle {name} to remove; qrank models lists them")
    _scan().delete_revisions(*commits).execute()


def _scan() -> HFCacheInfo:
    # Importing it takes 0.2 s, and most commands do not need it.
    from huggingface_hub import CacheNotFound, HFCacheInfo, constants, scan_cache_dir

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return HFCacheInfo(0, frozenset(), [])
