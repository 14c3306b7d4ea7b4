"""A bundle on disk with its manifest, read once and then passed around."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qrank.bundle import converted, hub
from qrank.bundle.hub_names import snapshot
from qrank.bundle.manifest import CONVERT_AGAIN, TOKENIZER, FileRecord, Manifest, Variant
from qrank.errors import BundleError
from qrank.system import cache
from qrank.system.frozen import unpacked


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its manifest; `qrank.bundle.locate` finds one by a model's name."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read the manifest; see `Manifest.load`."""
        try:
            return cls(folder, Manifest.load(folder))
        except BundleError as error:
            advised = str(error).replace(CONVERT_AGAIN, _advice(folder))
            raise BundleError(advised) from error

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json."""
        return self.folder / TOKENIZER

    def fetch(self, variants: Iterable[Variant]) -> None:
        """Download missing files, shared ones and those of variants, if the bundle is on the hub.

        Raises:
            ModelNotFoundError: the hub does not deliver them.
        """
        files = [*self.manifest.files, *(name for v in variants for name in v.files)]
        missing = [name for name in files if not (self.folder / name).exists()]
        if missing and (found := snapshot(self.folder)) is not None:
            hub.download(found.repository, missing, revision=found.commit, cache=found.cache)

    def on_hub_only(self, variant: Variant) -> bool:
        """Whether a variant of a bundle on the hub has not been downloaded yet."""
        here = any((self.folder / name).exists() for name in variant.files)
        return not here and snapshot(self.folder) is not None

    def provide(self, variant: Variant) -> None:
        """Make sure that a variant's files are present and match the manifest.

        Files of a bundle on the hub are downloaded only when the variant is about to run.

        Raises:
            ModelNotFoundError: the hub does not deliver them.
            BundleError: a file is missing or damaged.
        """
        self.fetch([variant])
        self.check(variant.files)

    def check(self, files: dict[str, FileRecord], *, always_hash: bool = False) -> None:
        """Compare files with the manifest's records.

        A hash is computed once and cached by path, size, time and inode: at 1.2 GB/s, hashing a
        4 GB model at every start would take too long.

        Args:
            files: path inside the bundle -> its record.
            always_hash: hash even files that matched before.

        Raises:
            BundleError: a file is missing or does not match the manifest.
        """
        for name, record in files.items():
            path = (self.folder / name).resolve()
            try:
                stat = path.stat()
            except OSError as error:
                raise BundleError(
                    f"{self.folder} lacks {name} ({error.strerror}); {_advice(self.folder)}"
                ) from error
            if stat.st_size != record.bytes:
                raise BundleError(
                    f"{path} has {stat.st_size:,} bytes, {record.bytes:,} expected; "
                    f"{_advice(self.folder)}"
                )
            state = _Hashed(stat.st_size, stat.st_mtime_ns, stat.st_ino, record.sha256)
            key = {"path": str(path)}
            lasting = not unpacked(path)
            if always_hash or not lasting or cache.load("hashes", key, _Hashed) != state:
                found = FileRecord.of(path).sha256
                if found != record.sha256:
                    raise BundleError(
                        f"{path} is damaged: its sha256 is {found[:12]}…, "
                        f"{record.sha256[:12]}… expected; {_advice(self.folder)}"
                    )
                if lasting:
                    cache.store("hashes", key, asdict(state))


def _advice(folder: Path) -> str:
    """What to do about a damaged bundle."""
    on_hub = snapshot(folder)
    name = converted.name_of(folder) or (on_hub and f"{on_hub.repository}@{on_hub.commit}")
    if name is None:
        return CONVERT_AGAIN
    again = "downloads" if on_hub else "converts"
    return f"remove it (qrank models --remove {name}); the next use {again} it again"


@dataclass(frozen=True)
class _Hashed:
    """A file's state when it was hashed."""

    size: int
    time: int
    inode: int
    sha256: str
