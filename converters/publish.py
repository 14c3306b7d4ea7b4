"""Publish a bundle's folder atomically, one conversion at a time.

    NAME-qrank/
      .qrank-lock       held by the conversion that writes here; contains its process id
      .qrank-work/      exists only during a conversion, or after one was killed
        new/            what is being made: a bundle of the new variants
        old/            files that it replaces
        moves.json      the planned moves, written before any file is moved

Everything stays within the bundle's own folder, so that moves stay on one disk and a mount point or
the working directory can be a bundle: such a folder cannot be renamed. The new files take effect
when the manifest is replaced, last and in one step. An exported folder has no manifest; there it is
when the list of moves is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from qrank.backends import formats
from qrank.bundle.manifest import MANIFEST, RENAMED, TOKENIZER, Manifest, is_plain
from qrank.converters.lock import LOCK, locked
from qrank.errors import BundleError, ConversionError, QrankError
from qrank.system import disk, paths

WORK = ".qrank-work"
_NEW, _OLD, _MOVES = "new", "old", "moves.json"

_OF_NOBODY = (LOCK, WORK, "lost+found", ".DS_Store", ".gitkeep")
"""What a folder may hold and still count as empty: qrank's own files and those of systems."""


def check_output(target: Path, sources: Iterable[Path] = (), *, force: bool = False) -> None:
    """Check that a bundle may be written to a folder, before any work.

    Args:
        target: the bundle's folder.
        sources: files and folders that the conversion reads.
        force: whether to replace the existing bundle.

    Raises:
        ConversionError: `target` is a link, a file or not writable, or holds something else; with
            `force`, it is, contains or lies in a source, or variant folders in it are links.
    """
    above = _place(target)
    bundle = (target / MANIFEST).is_file()
    # A bundle that already has all requested variants is not written to.
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


def check_folder(
    target: Path, source: Path, replaceable: Callable[[Path], list[str]], *, force: bool = False
) -> None:
    """Check that files that are no bundle may be written to a folder.

    Args:
        target: the folder.
        source: the bundle that they are made from.
        replaceable: finds the files in a folder that `force` replaces.
        force: whether the folder may hold something.

    Raises:
        ConversionError: `target` is a link, a file, not writable or a bundle, or holds something;
            with `force`, it holds links to replace.
    """
    above = _place(target)
    if not disk.writable(above):
        raise ConversionError(f"{above} cannot be written; name another folder with -o")
    if (target / MANIFEST).is_file() or target.resolve().is_relative_to(source.resolve()):
        raise ConversionError(f"{target} is a bundle or lies in one; name another folder with -o")
    if not target.is_dir():
        return
    if (found := _foreign(target)) and not force:
        raise ConversionError(
            f"{target} is not empty: it holds {found[0]}. Name another folder with -o, or --force "
            "to replace what an earlier export wrote there"
        )
    parts = [target / part for name in replaceable(target) for part in (name, *_above(name))]
    if links := [path for path in parts if path.is_symlink()]:
        raise ConversionError(
            f"--force replaces nothing behind a link, and {links[0]} is one: name another folder "
            "with -o"
        )


def _above(name: str) -> list[str]:
    return [str(path) for path in PurePosixPath(name).parents if path.name]


def _place(target: Path) -> Path:
    """The lowest existing folder of a path to write to.

    Raises:
        ConversionError: the path is a link or a file, or below a file.
    """
    if target.is_symlink():
        raise ConversionError(
            f"{target} is a link to {target.resolve()}: name that folder itself with -o"
        )
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; name a folder with -o")
    above = next(path for path in (target, *target.parents) if path.exists())
    if not above.is_dir():
        raise ConversionError(f"{above} is a file; name another folder with -o")
    return above


@contextmanager
def disks_explained(path: Path) -> Iterator[None]:
    """Turn read and write errors of the system into a ConversionError that names the disk.

    Raises:
        ConversionError: a disk is full, or the system denies access.
    """
    try:
        yield
    except ConversionError:
        raise
    except (OSError, QrankError) as error:
        said = disk.reported(error, path)
        if said is None and isinstance(error, QrankError):
            raise
        raise ConversionError(said or str(error)) from error


def _foreign(folder: Path) -> list[str]:
    """Names in a folder that are not left by a conversion."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in _OF_NOBODY)
    # Looked at last: another run may have published its bundle in the meantime, or still does, or
    # was killed while it did.
    if (folder / WORK / _MOVES).is_file() or (folder / MANIFEST).is_file():
        return []
    return names


def _meet(target: Path, source: Path) -> bool:
    """Whether two paths are the same or one contains the other, also through links and mounts."""
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
        """Move the new files into the bundle.

        Args:
            manifest: the new manifest.
            replaced: the manifest of the existing bundle; None if there is none or it is damaged.
            force: remove the existing bundle's files; otherwise they stay and variants are added.
        """
        names = [name for v in manifest.variants.values() for name in v.files]
        names = [n for n in (*manifest.files, *names) if (self.new / n).is_file()]
        if not force and replaced is not None:
            names = [name for name in names if name not in replaced.files]
        leaving = bundle_files(self.target, replaced) if force else []
        leaving += [n for n in names if (self.target / n).exists() and n not in leaving]
        self._move(names, leaving, manifest.digest)
        manifest.save(self.target)
        _remove_empty(self.target, leaving)

    def publish_files(self, leaving: Sequence[str]) -> None:
        """Move all new files into a folder that is no bundle.

        Args:
            leaving: existing files to remove, those that are replaced among them.
        """
        found = (path for path in self.new.rglob("*") if path.is_file())
        names = sorted(path.relative_to(self.new).as_posix() for path in found)
        self._move(names, leaving, digest="")
        # Without the list of moves, nothing is undone.
        (self._work / _MOVES).unlink()
        _remove_empty(self.target, leaving)

    def _move(self, names: Sequence[str], leaving: Sequence[str], digest: str) -> None:
        """Replace files; if this is interrupted, `_recover` restores the previous state.

        Args:
            names: the new files.
            leaving: the existing files.
            digest: of the manifest that makes it valid; "" if there is none.
        """
        moves = {"digest": digest, "new": names, "old": leaving}
        paths.write_atomically(self._work / _MOVES, json.dumps(moves))
        for name in leaving:
            _move(self.target, self._work / _OLD, name)
        for name in names:
            _move(self.new, self.target, name)


def bundle_files(folder: Path, manifest: Manifest | None) -> list[str]:
    """The existing files of a bundle, manifest first: only these may be replaced.

    Args:
        folder: the bundle's folder.
        manifest: the bundle's manifest; None if it cannot be read: file names decide then.
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
    """Hold a bundle's folder, created if missing; wait while another conversion holds it.

    Leftovers of a killed run are removed first, those of this run at the end. Folders created here
    are removed if they stay empty.
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
    """Undo a run that was stopped before its manifest was in place, and remove its leftovers."""
    work = target / WORK
    if not work.is_dir():
        return
    moves: dict[str, Any] = {"digest": "", "new": [], "old": []}
    if (path := work / _MOVES).exists():  # otherwise it had not moved anything yet
        moves = json.loads(path.read_text("utf-8"))
    if not all(is_plain(name) for name in (*moves["new"], *moves["old"])):
        raise ConversionError(f"{path} is none of qrank's: remove {work}")
    if _digest(target) != moves["digest"]:
        for name in moves["new"]:
            if not (work / _NEW / name).exists():
                (target / name).unlink(missing_ok=True)
        _remove_empty(target, moves["new"])
        # Restore the manifest last: until then the folder is not a bundle.
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
    """Remove the folders of removed files if they are empty."""
    for parent in sorted({(folder / name).parent for name in names} - {folder}):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
