"""A model's name -> where it is: a bundled name, a folder, or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from qrank.bundle import hub
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
"""Files that mean nothing by themselves: whoever names one means the model that it is a part of."""


def bundled() -> dict[str, Path]:
    """The bundles that come with qrank, by name."""
    from importlib import resources  # here, not above: slow, and importing qrank needs it not

    root = Path(str(resources.files("qrank.models")))
    return {path.parent.parent.name: path.parent for path in root.glob(f"*/bundle/{MANIFEST}")}


def place(model: str | Path, revision: str | None = None) -> Path | HubName:
    """What a user calls a model: a folder or file on disk, or what it is on the hub.

    A file that is but a part of a model stands for its folder, and a repository's folder in the
    hub's cache for the files of its main branch. What is on disk comes before the hub.

    Args:
        model: `owner/name`, `owner/name@revision`, `owner/name/FILE`, an address of the hub's, or
            a path.
        revision: of the hub's repository, where it is named beside.

    Raises:
        InputError: the name is empty, or there are two revisions.
        ModelNotFoundError: neither; with what a name may be.
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
            raise ModelNotFoundError(f"{text} is a folder or file; --revision is for hub ids")
        if path.is_file() and _is_part(path.name):
            return path.parent
        return newest_snapshot(path) or path
    if (name := parse(text)) is not None:
        return replace(name.at(revision), path="" if _is_part(name.path) else name.path)
    if (bundle := (found := bundled()).get(text)) is not None:
        return bundle
    raise ModelNotFoundError(
        f"no model {text!r}: it is neither a bundled model ({', '.join(found) or 'none'}), nor a "
        "folder or file here, nor a hub id (owner/name, owner/name@revision)"
    )


def _is_part(name: str) -> bool:
    return any(PurePosixPath(name).match(part) for part in _PARTS)


def locate(model: str | Path | Bundle, *, whole: bool = True) -> Bundle:
    """Find a bundle and read its manifest; the hub is asked here, and nowhere else.

    Args:
        model: a bundled name ("mini"), a folder, or a bundle's hub id: "owner/name", or
            "owner/name@revision" for a branch, a tag or a commit. Or what this returned before.
        whole: download all that a hub's bundle holds; else what is read of any bundle, and
            `Bundle.provide` the files of the variant that is to run.

    Raises:
        ModelNotFoundError: nothing is there, or it is a checkpoint that wants converting.
        BundleError: its manifest is damaged.
    """
    bundle = model if isinstance(model, Bundle) else _found(model)
    bundle.fetch(bundle.manifest.variants.values() if whole else ())
    return bundle


def _found(model: str | Path) -> Bundle:
    where = bundled().get(str(model)) or place(model)
    folder = where if isinstance(where, Path) else _described_on_hub(model, where)
    if not (folder / MANIFEST).is_file():
        raise ModelNotFoundError(_no_bundle(model, folder))
    return Bundle.load(folder)


def _described_on_hub(model: str | Path, name: HubName) -> Path:
    """Download what is read of every bundle: little, so that no bars are drawn."""
    if name.path:
        raise ModelNotFoundError(
            f"{model} is no bundle: on the hub, a bundle is a whole repository "
            f"({name.repository}). Other files are to be converted first: qrank convert {model}"
        )
    wanted = [MANIFEST, TOKENIZER]
    return hub.download(name.repository, wanted, revision=name.revision, bars=False)


def _no_bundle(model: str | Path, path: Path) -> str:
    """Why a place that was found is no bundle, and what to do."""
    if (bundle := _bundle_around(path)) is not None:
        return f"{path} is a part of the bundle {bundle}: name that, and --backend for the variant"
    if path.is_file():
        return f"{path} is a file, not a bundle; convert it first: qrank convert {path}"
    if (found := snapshot(path)) is not None:
        return (
            f"{found.repository} on the hub is no bundle; convert it first: qrank convert {model} "
            "(or run it as it is, with --backend torch)"
        )
    if (path / "config.json").is_file():
        return (
            f"{path} is a checkpoint, not a bundle; convert it first: qrank convert {path} "
            "(or run it as it is, with --backend torch)"
        )
    return f"{path} is no bundle: it holds no {MANIFEST}"


@dataclass(frozen=True)
class Fetched:
    """Files of a model that is to be converted.

    Attributes:
        folder: where they are.
        id: the hub's id, or else the folder's name.
        commit: the hub's; None of what is no hub's.
    """

    folder: Path
    id: str
    commit: str | None

    @classmethod
    def of(cls, folder: Path) -> Fetched:
        """A folder as what it is: that of the hub's cache is the hub's."""
        if (found := snapshot(folder)) is not None:
            return cls(folder, found.repository, found.commit)
        return cls(folder, folder.resolve().name, None)


def fetch(
    where: Path | HubName, source: str, files: list[str], *, offline: bool = False
) -> Fetched:
    """A folder's or a hub repository's files, of a model that is no bundle yet.

    Args:
        where: of `place`.
        source: what the user calls it.
        files: of the hub's repository; names or patterns.
        offline: use what was downloaded before only.

    Raises:
        ModelNotFoundError: it is not to be had, is a file, or a bundle already.
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
    """See that what is to be converted is no bundle, and no part of one.

    Raises:
        ModelNotFoundError: it is.
    """
    # Beside a bundle, a repository may hold the checkpoint that it was made of.
    whole = (path / MANIFEST).is_file() and not (path / "config.json").is_file()
    if (bundle := path if whole else _bundle_around(path)) is not None:
        raise ModelNotFoundError(
            f"{source} is {'a' if whole else 'a part of a'} bundle already: score with it "
            f"(qrank score -m {source if whole else bundle}), or convert what it was made of, "
            f"{Manifest.load(bundle).source.id}"
        )


def _bundle_around(path: Path) -> Path | None:
    """The bundle that a variant's folder, or a file in it, is a part of."""
    for folder in (path, path.parent):
        around = folder.parent
        if (around / MANIFEST).is_file():
            variants = Manifest.load(around).variants.values()
            if folder.name in {variant.folder for variant in variants}:
                return around
    return None
