"""A model's name -> where it is: a bundled name, a folder, or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from qrank.bundle import converted, hub
from qrank.bundle.hub_names import HubName, newest_snapshot, parse, snapshot
from qrank.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from qrank.bundle.opened import Bundle
from qrank.errors import InputError, ModelNotFoundError

DEFAULT = "mini"

_PARTS = (
    MANIFEST,
    TOKENIZER,
    "config.json",
    "tokenizer_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""Files that are only parts of a model: naming one means the whole model."""


def bundled() -> dict[str, Path]:
    """The bundles that come with qrank, by name."""
    from importlib import resources  # imported here: slow, and `import qrank` does not need it

    root = Path(str(resources.files("qrank.models")))
    return {path.parent.parent.name: path.parent for path in root.glob(f"*/bundle/{MANIFEST}")}


def place(model: str | Path, revision: str | None = None) -> Path | HubName:
    """Resolve a user's name for a model to a folder or file on disk, or to a hub name.

    A file that is only a part of a model means its folder, and a repository's folder in the hub's
    cache means its main branch's snapshot. Paths on disk take precedence over hub names, and these
    over bundled names.

    Args:
        model: `owner/name`, `owner/name@revision`, `owner/name/FILE`, a hub address, a path, or a
            bundled name.
        revision: of the hub repository, if given separately.

    Raises:
        InputError: the name is empty, or there are two different revisions.
        ModelNotFoundError: it is none of these (the message lists what a name may be), is on disk
            but has a revision, or is a path that cannot be accessed.
    """
    text = str(model).strip()
    if not text:
        raise InputError("the model's name is empty")
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # no access, too long; no home
        raise ModelNotFoundError(f"{text} cannot be looked at: {error}") from error
    if exists:
        if revision is not None:
            raise ModelNotFoundError(f"{text} is a folder or file; a revision is for hub ids")
        if path.is_file() and _is_part(path.name):
            return path.parent
        return newest_snapshot(path) or path
    if (name := parse(text)) is not None:
        return replace(name.at(revision), path="" if _is_part(name.path) else name.path)
    if (bundle := (found := bundled()).get(text)) is not None:
        if revision is not None:
            raise ModelNotFoundError(f"{text} comes with qrank; a revision is for hub ids")
        return bundle
    raise ModelNotFoundError(
        f"no model {text!r}: it is neither a bundled model ({', '.join(found) or 'none'}), nor a "
        "folder or file here, nor a hub id (owner/name, owner/name@revision)"
    )


def _is_part(name: str) -> bool:
    return any(PurePosixPath(name).match(part) for part in _PARTS)


def locate(
    model: str | Path | Bundle, *, revision: str | None = None, whole: bool = True
) -> Bundle:
    """Find a bundle and read its manifest; a bundle on the hub is looked up only here.

    Args:
        model: a bundled name ("mini"), a folder, or the hub id of a bundle, or of a checkpoint
            that was converted before (`qrank.bundle.converted`): "owner/name", or
            "owner/name@revision" for a branch, a tag or a commit. Or a `Bundle`.
        revision: of the hub repository, if given separately.
        whole: download all files of a hub bundle. If not, only the files that every variant needs;
            `Bundle.provide` then downloads those of the variant to run.

    Raises:
        ModelNotFoundError: there is nothing, or a checkpoint that must be converted first.
        BundleError: the manifest is damaged.
    """
    found = find(model, revision)
    if isinstance(found, HubName):
        raise unconverted(found)
    found.fetch(found.manifest.variants.values() if whole else ())
    return found


def find(model: str | Path | Bundle, revision: str | None = None) -> Bundle | HubName:
    """A bundle; or the hub's name of a checkpoint that has not been converted yet.

    Raises as `locate`.
    """
    if isinstance(model, Bundle):
        if revision is not None:
            raise InputError(f"{model.folder} is a Bundle; a revision is for hub ids")
        return model
    own = bundled().get(str(model)) if revision is None else None
    where = own or place(model, revision)
    if isinstance(where, Path):
        folder = where
    else:
        folder = converted.place_of(where)
        if where.path or not (folder / MANIFEST).is_file():
            folder = _described_on_hub(model, where)
            if not (folder / MANIFEST).is_file():
                return where
    if not (folder / MANIFEST).is_file():
        raise ModelNotFoundError(_no_bundle(model, folder))
    return Bundle.load(folder)


def unconverted(name: HubName) -> ModelNotFoundError:
    """The error for a checkpoint on the hub where a bundle is needed."""
    return ModelNotFoundError(
        f"{name.repository} on the hub is no bundle; convert it first: qrank convert {name} "
        "(or run it as it is, with --backend torch)"
    )


def _described_on_hub(model: str | Path, name: HubName) -> Path:
    """Download what is read of every bundle: it is small, so without progress bars."""
    if name.path:
        raise ModelNotFoundError(
            f"{model} is no bundle: on the hub, a bundle is a whole repository "
            f"({name.repository}). Other files are to be converted first: qrank convert {model}"
        )
    wanted = [MANIFEST, TOKENIZER]
    return hub.download(name.repository, wanted, revision=name.revision, bars=False)


def _no_bundle(model: str | Path, path: Path) -> str:
    """Why an existing path is not a bundle, and what to do."""
    if (bundle := _bundle_around(path)) is not None:
        return f"{path} is a part of the bundle {bundle}: name that, and --backend for the variant"
    if path.is_file():
        return f"{path} is a file, not a bundle; convert it first: qrank convert {path}"
    if (path / "config.json").is_file():
        return (
            f"{path} is a checkpoint, not a bundle; convert it first: qrank convert {path} "
            "(or run it as it is, with --backend torch)"
        )
    return f"{path} is no bundle: it holds no {MANIFEST}"


@dataclass(frozen=True)
class Fetched:
    """Files of a model to be converted.

    Attributes:
        folder: where they are.
        id: the hub id, or the folder's name if it is not from the hub.
        commit: on the hub; None if it is not from the hub.
    """

    folder: Path
    id: str
    commit: str | None

    @classmethod
    def of(cls, folder: Path) -> Fetched:
        """Describe a folder; one in the hub's cache gets its hub id and commit."""
        if (found := snapshot(folder)) is not None:
            return cls(folder, found.repository, found.commit)
        return cls(folder, folder.resolve().name, None)


def fetch(
    where: Path | HubName, source: str, files: list[str], *, offline: bool = False
) -> Fetched:
    """Get the files of a model that is not a bundle yet, from a folder or a hub repository.

    Args:
        where: from `place`.
        source: the user's name for it.
        files: to download from the hub; names or patterns.
        offline: use only what was downloaded before.

    Raises:
        ModelNotFoundError: it is unavailable, a file, or already a bundle.
    """
    if where.path if isinstance(where, HubName) else not where.is_dir():
        raise ModelNotFoundError(
            f"{source} is a file or no folder; give all of a checkpoint (config.json, "
            "*.safetensors and the tokenizer), or an OpenVINO, ONNX or GGUF file"
        )
    if isinstance(where, Path):
        found = Fetched.of(where)
    else:
        wanted = [*files, MANIFEST]
        folder = hub.download(where.repository, wanted, revision=where.revision, offline=offline)
        found = Fetched(folder, where.repository, folder.name)
    refuse_bundle(source, found.folder)
    return found


def refuse_bundle(source: str, path: Path) -> None:
    """Check that the source of a conversion is not a bundle, nor a part of one.

    Raises:
        ModelNotFoundError: it is.
    """
    # Next to a bundle, a repository may hold the checkpoint that the bundle was made from.
    whole = (path / MANIFEST).is_file() and not (path / "config.json").is_file()
    if (bundle := path if whole else _bundle_around(path)) is not None:
        raise ModelNotFoundError(
            f"{source} is {'a' if whole else 'a part of a'} bundle already: score with it "
            f"(qrank score -m {source if whole else bundle}), or convert what it was made of, "
            f"{Manifest.load(bundle).source.id}"
        )


def _bundle_around(path: Path) -> Path | None:
    """The bundle that contains a variant's folder, or a file in it; None if there is none."""
    for folder in (path, path.parent):
        around = folder.parent
        if (around / MANIFEST).is_file():
            variants = Manifest.load(around).variants.values()
            if folder.name in {variant.folder for variant in variants}:
                return around
    return None
