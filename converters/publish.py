"""A bundle's folder while it is written: one conversion at a time, and whole or not at all.

    NAME-qrank/
      .qrank-lock       held by the conversion that writes here; names its process
      .qrank-work/      only while it does, or where it was killed
        new/            what is being made: a bundle of the new variants
        old/            files that it replaces
        moves.json      written before anything is moved: what is going to be

Everything lies within the bundle's own folder, so that what is moved stays on one disk, and so that
a mount point and the working directory can be bundles: a folder of theirs cannot be renamed.
What makes the new files count is the manifest, replaced last in one step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrank.backends import formats
from qrank.bundle.manifest import MANIFEST, RENAMED, TOKENIZER, Manifest, is_plain
from qrank.converters.lock import LOCK, locked
from qrank.errors import BundleError, ConversionError
from qrank.system import disk, paths

WORK = ".qrank-work"
_NEW, _OLD, _MOVES = "new", "old", "moves.json"

_OF_NOBODY = (LOCK, WORK, "lost+found", ".DS_Store", ".gitkeep")
"""What an empty folder may hold: ours, and what systems put into a volume."""


def check_output(target: Path, sources: Iterable[Path] = (), *, force: bool = False) -> None:
    """See that a bundle may be written to a place, before any work.

    Args:
        target: the bundle's folder.
        sources: files and folders that the conversion reads.
        force: the bundle that is there shall be replaced.

    Raises:
        ConversionError: it is no folder, holds something else, cannot be written; or with `force`
            is, holds or lies in what is converted.
    """
    if target.is_symlink():
        raise ConversionError(
            f"{target} is a link to {target.resolve()}: name that folder itself with -o"
        )
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; name a folder with -o")
    bundle = (target / MANIFEST).is_file()
    above = next(path for path in (target, *target.parents) if path.exists())
    if not above.is_dir():
        raise ConversionError(f"{above} is a file; name another folder with -o")
    # Of a bundle that has all that is wanted already, nothing is written.
    if not disk.writable(above) and (force or not bundle):
        raise ConversionError(f"{above} cannot be written; name another folder with -o")
    if target.is_dir() and not bundle and _foreign(target):
        raise ConversionError(
            f"{target} exists and is no bundle: it holds {_foreign(target)[0]}. Name another "
            "folder with -o"
        )
    if not force:
        return
    for source in sources:
        if _meet(target, source):
            raise ConversionError(
                f"--force does not replace {target}: it is, holds or lies in {source}, which the "
                "conversion reads. Name another folder with -o"
            )
    variants = (path for path in target.glob("*-*") if path.name not in _OF_NOBODY)
    links = [path for path in variants if path.is_symlink()]
    if links and bundle:
        raise ConversionError(
            f"--force replaces nothing behind a link, and {links[0]} is one: name another folder "
            "with -o"
        )


def _foreign(folder: Path) -> list[str]:
    """Names in a folder that no conversion leaves there."""
    if (folder / WORK / _OLD / MANIFEST).is_file():
        return []  # a bundle, but for a run that was killed while it replaced it
    return sorted(path.name for path in folder.iterdir() if path.name not in _OF_NOBODY)


def _meet(target: Path, source: Path) -> bool:
    """Whether one of two paths is the other or lies in it, through links and mounts too."""
    target, source = target.resolve(), source.resolve()
    return any(_are_same(path, source) for path in (target, *target.parents)) or any(
        _are_same(path, target) for path in (source, *source.parents)
    )


def _are_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


class Workshop:
    """A bundle's folder, held by one conversion.

    Attributes:
        target: the folder.
        new: an empty folder to make a bundle of the new variants in.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._work = target / WORK
        self.new = self._work / _NEW

    def publish(self, manifest: Manifest, replaced: Manifest | None, force: bool) -> None:
        """Move what was made into the bundle.

        Args:
            manifest: of the bundle as it shall be.
            replaced: of the bundle that is there; None where there is none, or a damaged one.
            force: the files of that go; else they stay, and variants join them.
        """
        names = [name for v in manifest.variants.values() for name in v.files]
        names = [n for n in (*manifest.files, *names) if (self.new / n).is_file()]
        if not force and replaced is not None:
            names = [name for name in names if name not in replaced.files]
        leaving = bundle_files(self.target, replaced) if force else []
        leaving += [n for n in names if (self.target / n).exists() and n not in leaving]
        moves = {"digest": manifest.digest, "new": names, "old": leaving}
        paths.write_atomically(self._work / _MOVES, json.dumps(moves))
        # Where this is stopped, `_recover` puts back what was there.
        for name in leaving:
            _move(self.target, self._work / _OLD, name)
        for name in names:
            _move(self.new, self.target, name)
        manifest.save(self.target)
        _remove_empty(self.target, leaving)


def bundle_files(folder: Path, manifest: Manifest | None) -> list[str]:
    """The files that are there of a bundle, its manifest first: these alone may be replaced.

    Args:
        folder: the bundle's.
        manifest: its own; None where that cannot be read: then by the names that files have.
    """
    if manifest is not None:
        variants = manifest.variants.values()
        names = [*manifest.files, *(name for v in variants for name in v.files)]
    else:
        names = [TOKENIZER]
        for name, format in formats().items():
            for precision in (*(each.name for each in format.precisions), *RENAMED):
                for path in sorted(folder.glob(f"{name}-{precision}/*")):
                    if path.name.startswith("model.") or path.name == "head.npy":
                        names.append(path.relative_to(folder).as_posix())
    return [n for n in (MANIFEST, *names) if (folder / n).is_file() or (folder / n).is_symlink()]


@contextmanager
def workshop(target: Path) -> Iterator[Workshop]:
    """Hold a bundle's folder, made if need be; wait for the conversion that holds it.

    What a killed run left is cleared first, and what this one leaves last: of a folder that gets no
    bundle, nothing stays.
    """
    made = [path for path in (target, *target.parents) if not path.exists()]
    try:
        with locked(target):
            _recover(target)
            try:
                shop = Workshop(target)
                shop.new.mkdir(parents=True)
                yield shop
            finally:
                _recover(target)
    finally:
        for path in made:
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()


def _recover(target: Path) -> None:
    """Undo what a run did that was stopped before its manifest was in place; clear what it left."""
    work = target / WORK
    if not work.is_dir():
        return
    moves: dict[str, Any] = {"digest": "", "new": [], "old": []}
    if (path := work / _MOVES).exists():  # else it had moved nothing yet
        moves = json.loads(path.read_text("utf-8"))
    if not all(is_plain(name) for name in (*moves["new"], *moves["old"])):
        raise ConversionError(f"{path} is none of qrank's: remove {work}")
    if _digest(target) != moves["digest"]:
        for name in moves["new"]:
            if not (work / _NEW / name).exists():
                (target / name).unlink(missing_ok=True)
        _remove_empty(target, moves["new"])
        # The manifest last: until then it is no bundle.
        for name in reversed(moves["old"]):
            if (work / _OLD / name).is_file() or (work / _OLD / name).is_symlink():
                _move(work / _OLD, target, name)
    shutil.rmtree(work)


def _digest(folder: Path) -> str | None:
    try:
        return Manifest.load(folder).digest
    except BundleError:
        return None


def _move(source: Path, target: Path, name: str) -> None:
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (source / name).replace(path)


def _remove_empty(folder: Path, names: Sequence[str]) -> None:
    """Remove the folders of files that have gone, where nothing else is in them."""
    for parent in sorted({(folder / name).parent for name in names} - {folder}):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
