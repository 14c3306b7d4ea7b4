"""Bundles that qrank converted by itself from hub ids, in the user's data folder.

    bundles/                      in $QRANK_DATA, or in the platform's folder for a user's data
      BAAI--bge-reranker-base/       of the main branch
      BAAI--bge-reranker-base@v1.0/  of another revision, percent-encoded

A bundle belongs to the revision as the user wrote it: it stays when the branch moves on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote, unquote

from qrank.bundle.hub_names import HubName
from qrank.bundle.manifest import MANIFEST
from qrank.errors import ConversionError, ModelNotFoundError
from qrank.system import disk, paths

_REMOVED = ".removed"
"""Folder that a bundle is moved to first: a removal that is killed leaves no half bundle."""


def place_of(name: HubName) -> Path:
    """The folder of a hub repository's bundle, which need not exist."""
    owner, _, repository = name.repository.partition("/")
    revision = quote(name.revision or "main", safe="")
    return _root() / f"{owner}--{repository}{'' if revision == 'main' else f'@{revision}'}"


def name_of(folder: Path) -> str | None:
    """The hub id (`owner/name` or `owner/name@revision`) of a bundle in the data folder.

    None for any other folder.
    """
    owner, dashes, rest = folder.name.partition("--")
    if not dashes or folder.absolute().parent != _root():
        return None
    repository, at, revision = rest.partition("@")
    return f"{owner}/{repository}{at}{unquote(revision)}"


def converted() -> dict[str, Path]:
    """The bundles by their hub ids, in alphabetical order."""
    found = {name_of(path.parent): path.parent for path in _root().glob(f"*/{MANIFEST}")}
    return {name: found[name] for name in sorted(filter(None, found))}


def check_writable() -> None:
    """Check that bundles can be stored, before any work.

    Raises:
        ConversionError: the data folder cannot be written.
    """
    root = _root()
    if not root.is_absolute() or not disk.writable(root):  # without a home, "~" is not expanded
        raise ConversionError(
            f"{root} cannot be written, and the converted model is to be stored there: set "
            "QRANK_DATA to a writable folder, or name one to qrank convert (-o)"
        )


def remove(name: str) -> None:
    """Remove a bundle from the data folder.

    Raises:
        ModelNotFoundError: it is not there.
        OSError: it cannot be removed.
    """
    if (folder := converted().get(name)) is None:
        raise ModelNotFoundError(f"there is no bundle {name} in {_root()}")
    trash = _root() / _REMOVED
    if trash.exists():
        shutil.rmtree(trash)
    trash.mkdir()
    folder.rename(trash / folder.name)
    shutil.rmtree(trash)


def _root() -> Path:
    return paths.data_folder() / "bundles"
