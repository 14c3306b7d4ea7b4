"""A bundle on disk with its manifest: read once, then handed to whatever works with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qrank.bundle import hub
from qrank.bundle.hub_names import snapshot
from qrank.bundle.manifest import CONVERT_AGAIN, TOKENIZER, FileRecord, Manifest, Variant
from qrank.errors import BundleError
from qrank.system import cache


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its manifest; `qrank.bundle.locate` makes one of a model's name."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read the manifest; see `Manifest.load`."""
        return cls(folder, Manifest.load(folder))

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json."""
        return self.folder / TOKENIZER

    def fetch(self, variants: Iterable[Variant]) -> None:
        """Download what is read of any bundle, and variants; only a bundle on the hub lacks them.

        Raises:
            ModelNotFoundError: the hub does not give them.
        """
        files = [*self.manifest.files, *(name for v in variants for name in v.files)]
        missing = [name for name in files if not (self.folder / name).exists()]
        if missing and (found := snapshot(self.folder)) is not None:
            hub.download(found.repository, missing, revision=found.commit, cache=found.cache)

    def on_hub_only(self, variant: Variant) -> bool:
        """Whether a variant of a bundle on the hub was not downloaded yet."""
        here = any((self.folder / name).exists() for name in variant.files)
        return not here and snapshot(self.folder) is not None

    def provide(self, variant: Variant) -> None:
        """Have a variant's files here, whole and as the manifest says.

        Those of a bundle on the hub are downloaded when the variant is to run, and not before.

        Raises:
            ModelNotFoundError: the hub does not give them.
            BundleError: a file is missing or damaged.
        """
        self.fetch([variant])
        self.check(variant.files)

    def check(self, files: dict[str, FileRecord], *, always_hash: bool = False) -> None:
        """Compare files with the manifest's records.

        A hash is worked out once and remembered by path, size, time and inode: at 1.2 GB/s a 4 GB
        model cannot be hashed at every start.

        Args:
            files: path inside the bundle -> what it must be.
            always_hash: hash even what was found right before.

        Raises:
            BundleError: a file is missing, or is not what the manifest says.
        """
        for name, record in files.items():
            path = (self.folder / name).resolve()
            try:
                stat = path.stat()
            except OSError as error:
                raise BundleError(
                    f"{self.folder} lacks {name} ({error.strerror}); {CONVERT_AGAIN}"
                ) from error
            if stat.st_size != record.bytes:
                raise BundleError(
                    f"{path} has {stat.st_size:,} bytes, {record.bytes:,} expected; {CONVERT_AGAIN}"
                )
            state = _Hashed(stat.st_size, stat.st_mtime_ns, stat.st_ino, record.sha256)
            key = {"path": str(path)}
            if always_hash or cache.load("hashes", key, _Hashed) != state:
                found = FileRecord.of(path).sha256
                if found != record.sha256:
                    raise BundleError(
                        f"{path} is damaged: its sha256 is {found[:12]}…, "
                        f"{record.sha256[:12]}… expected; {CONVERT_AGAIN}"
                    )
                cache.store("hashes", key, asdict(state))


@dataclass(frozen=True)
class _Hashed:
    """A file as it was when it was hashed."""

    size: int
    time: int
    inode: int
    sha256: str
