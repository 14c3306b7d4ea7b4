"""A model's name -> its bundle on disk: a bundled name, then a folder, then a hub id."""

from __future__ import annotations

from pathlib import Path

from qrank.bundle import MANIFEST, Manifest
from qrank.errors import ModelNotFoundError
from qrank.hub import download, is_hub_id

DEFAULT = "mini"


def bundled() -> dict[str, Path]:
    """The bundles that come with qrank, by name."""
    from importlib import resources  # here, not above: slow, and importing qrank needs it not

    root = Path(str(resources.files("qrank.models")))
    return {path.parent.parent.name: path.parent for path in root.glob(f"*/bundle/{MANIFEST}")}


def locate(model: str | Path) -> Path:
    """Find a bundle.

    Args:
        model: a bundled name ("mini"), a folder, or a hub id ("owner/name") of a bundle.

    Raises:
        ModelNotFoundError: nothing is there, or it is a checkpoint that wants converting.
        BundleError: its manifest is damaged.
    """
    found = bundled()
    if str(model) in found:
        return found[str(model)]
    folder = Path(model)
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            return folder
        if (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{folder} is a checkpoint, not a bundle; convert it first: qrank convert {folder}"
                " (or run it as it is, with --backend torch)"
            )
        raise ModelNotFoundError(f"{folder} is no bundle: it holds no {MANIFEST}")
    if is_hub_id(str(model)):
        return _from_hub(str(model))
    raise ModelNotFoundError(
        f"no model {str(model)!r}: it is neither a bundled model ({', '.join(found) or 'none'}), "
        "nor a folder, nor a hub id (owner/name)"
    )


def _from_hub(repository: str) -> Path:
    folder = download(repository, [MANIFEST])
    if not (folder / MANIFEST).is_file():
        raise ModelNotFoundError(
            f"{repository} on the hub is no bundle; convert it first: qrank convert {repository}"
            " (or run it as it is, with --backend torch)"
        )
    manifest = Manifest.load(folder)
    files = [*manifest.files, *(f for v in manifest.variants.values() for f in v.files)]
    return download(repository, [MANIFEST, *files], revision=folder.name)
