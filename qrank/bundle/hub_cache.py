"""What huggingface_hub's cache holds: bundles, and the checkpoints that bundles were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qrank.bundle.manifest import MANIFEST
from qrank.errors import ModelNotFoundError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class Cached:
    """A bundle in the cache.

    Attributes:
        repository: `owner/name`.
        commit: on the hub.
        refs: branches and tags that point to the commit, as far as the cache knows.
        folder: of its files.
    """

    repository: str
    commit: str
    refs: frozenset[str]
    folder: Path

    @property
    def cache(self) -> Path:
        """The cache's folder: the parent of `models--owner--name/snapshots/COMMIT`."""
        return self.folder.parents[2]

    @property
    def name(self) -> str:
        """`owner/name`, or with a branch or tag, or else the commit: `owner/name@v1.0`."""
        if "main" in self.refs:
            return self.repository
        return f"{self.repository}@{min(self.refs, default=self.commit)}"


def cached() -> list[Cached]:
    """The bundles in the cache, by name."""
    found = [
        Cached(repo.repo_id, rev.commit_hash, rev.refs, rev.snapshot_path)
        for repo in _repositories()
        for rev in repo.revisions
        if any(file.file_path == rev.snapshot_path / MANIFEST for file in rev.files)
    ]
    return sorted(found, key=lambda each: each.name)


def size(repository: str) -> int:
    """Bytes that a model's repository takes in the cache; 0 if it is not there."""
    return sum(repo.size_on_disk for repo in _repositories() if repo.repo_id == repository)


def remove(name: str) -> None:
    """Remove a bundle from the cache; files that other revisions share stay.

    Args:
        name: as in `Cached.name`, or `owner/name@COMMIT`.

    Raises:
        ModelNotFoundError: it is not there.
    """
    bundles = [b for b in cached() if name in (b.name, f"{b.repository}@{b.commit}")]
    if not bundles:
        raise ModelNotFoundError(f"there is no bundle {name} to remove; qrank models lists them")
    from huggingface_hub import scan_cache_dir

    scan_cache_dir(bundles[0].cache).delete_revisions(*(b.commit for b in bundles)).execute()


def _repositories() -> list[CachedRepoInfo]:
    """The models in the cache."""
    # Importing it takes 0.2 s, and most commands do not need it.
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return [repository for repository in found.repos if repository.repo_type == "model"]
