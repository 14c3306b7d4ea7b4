"""Find the prebuilt files of a source and choose which of several to import."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from qrank.backends import formats
from qrank.backends.contract import PLAIN, Precision
from qrank.bundle.hub import download, listing
from qrank.bundle.hub_names import HubName
from qrank.bundle.locate import Fetched, fetch, place, refuse_bundle
from qrank.converters.checkpoint.read import DESCRIPTION, WEIGHTS, check_description
from qrank.converters.prebuilt import Importer, Prebuilt, Request, format_of, patterns
from qrank.errors import ConversionError, ModelNotFoundError, QrankError

_FOLDERS = ("onnx", "openvino")
"""Folders of a repository that may hold prebuilt files, besides its top level."""

_NOT_MODELS = ("openvino_tokenizer", "openvino_detokenizer")


def find(
    source: str,
    asked: Request | None,
    *,
    family: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Prebuilt | Fetched:
    """The prebuilt files of a source; its location if it holds a checkpoint or nothing known.

    Args:
        source: a folder, a file or a name on the hub, as in `qrank.bundle.locate.place`.
        asked: the requested variants; None: every format found.
        family: a card's name or file; None to match by config.json.
        revision: revision of the hub repository.
        offline: use only what is already downloaded.

    Raises:
        ConversionError: no requested variant is there.
        ModelNotFoundError: the hub repository is unavailable, or the source is already a bundle.
        FamilyError: it is a checkpoint on the hub that cannot be converted; its weights are not
            downloaded then.
    """
    where = place(source, revision)
    if isinstance(where, HubName):
        return _on_hub(where, asked, source, family, offline)
    if where.is_dir():
        return _in_folder(fetch(where, source, []), asked, source)
    refuse_bundle(source, where)
    if (format := format_of(where.name)) is None:
        return fetch(where, source, [])
    home = _home(where.parent, where.resolve().parent)
    made, missing = _choose_all({format: [where.name]}, where.parent, asked, source)
    origin = Fetched.of(home)
    known = origin.commit is not None or where.stem.startswith(PLAIN)
    return Prebuilt(home, origin.id if known else where.stem, origin.commit, made, missing)


def _in_folder(found: Fetched, asked: Request | None, source: str) -> Prebuilt | Fetched:
    folder = found.folder
    candidates = _candidates(_names(folder))
    if any(folder.glob("*.safetensors")) or not candidates:
        return found
    made, missing = _choose_all(candidates, folder, asked, source)
    origin = Fetched.of(home := _home(folder))
    return Prebuilt(home, origin.id, origin.commit, made, missing)


def _on_hub(
    name: HubName, asked: Request | None, source: str, family: str | None, offline: bool
) -> Prebuilt | Fetched:
    """Handle a repository, or a file or known folder in it."""
    whole = replace(name, path="")
    format = format_of(name.path)
    if name.path and format is None and name.path not in _FOLDERS:
        return fetch(name, source, [])
    wanted = [*DESCRIPTION, *WEIGHTS] if offline and not name.path else DESCRIPTION
    found = fetch(whole, source, wanted, offline=offline)
    names = _names(found.folder)
    if not offline and format is None and (name.path or not _weighed(names)):
        names = listing(found.id, found.folder.name)
    if not name.path and _weighed(names):
        check_description(found, family)
        download(found.id, WEIGHTS, revision=found.folder.name, offline=offline)
        return found
    if format is not None:
        candidates = {format: [name.path]}
    else:
        candidates = _candidates(n for n in names if n.startswith(name.path))
    if not candidates and name.path:
        raise ModelNotFoundError(f"{found.id} on the hub has no model in {name.path} ({source})")
    if not candidates:
        return found
    made, missing = _choose_all(candidates, found.folder, asked, source)
    files = [p for m in made for p in patterns(m.path.relative_to(found.folder).as_posix())]
    download(found.id, files, revision=found.folder.name, offline=offline)
    if absent := [importer.path.name for importer in made if not importer.path.exists()]:
        raise ModelNotFoundError(f"{found.id} on the hub has no file {absent[0]} ({source})")
    return Prebuilt(found.folder, found.id, found.commit, made, missing)


def _weighed(names: Iterable[str]) -> bool:
    """Whether files are those of a checkpoint: its weights are at the top level."""
    return any("/" not in name and name.endswith(".safetensors") for name in names)


def _home(*folders: Path) -> Path:
    """The folder with config.json: the files' folder or its parent, also after resolving links."""
    for folder in folders:
        for at in (folder.absolute(), folder.resolve()):
            for home in (at, at.parent) if at.name in _FOLDERS else (at,):
                if (home / "config.json").is_file():
                    return home
    return folders[0]


def _names(folder: Path) -> list[str]:
    places = [folder, *(folder / name for name in _FOLDERS)]
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def _candidates(names: Iterable[str]) -> dict[str, list[str]]:
    """Format -> its files that may be a model."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path, format = PurePosixPath(name), format_of(name)
        known_place = str(path.parent) in (".", *_FOLDERS)
        if format and known_place and path.stem not in _NOT_MODELS:
            found.setdefault(format, []).append(name)
    return found


def _choose_all(
    candidates: dict[str, list[str]], folder: Path, asked: Request | None, source: str
) -> tuple[tuple[Importer, ...], dict[str, QrankError]]:
    """The files to import, and the requested variants that are unavailable, with the reason.

    Args:
        candidates: format -> file names.
        folder: the files' folder.
        asked: the requested variants; None: every format found.
        source: the source as the user gave it.

    Raises:
        ConversionError: no requested variant is available.
    """
    made: list[Importer] = []
    missing: dict[str, QrankError] = {}
    for format, precision in asked or [(f, None) for f in formats() if f in candidates]:
        try:
            if format not in candidates:
                raise ConversionError(
                    f"{source} holds prebuilt files of {', '.join(candidates)} and none of "
                    f"{format}; converting to it takes the checkpoint"
                )
            name = _choose(format, candidates[format], precision, source)
            made.append(Importer(folder / name, format, precision))
        except ConversionError as error:
            missing[f"{format}-{precision}" if precision else format] = error
    if not made:
        raise next(iter(missing.values()))
    return tuple(made), missing


def _choose(format: str, names: list[str], precision: str | None, source: str) -> str:
    """The file to import, chosen by its name if there are several.

    Raises:
        ConversionError: no name matches.
    """
    if len(names) == 1:
        return names[0]
    known = formats()[format].precisions
    for wanted in known:
        if (precision is None and wanted.stem is None) or precision not in (None, wanted.name):
            continue
        if fitting := [name for name in names if _called(name, wanted)]:
            return min(fitting, key=lambda name: (len(name), name))
    raise ConversionError(
        f"{source} holds several {format} files: {', '.join(names)}; name one, as in "
        f"{source}/{names[0]}"
    )


def _called(name: str, precision: Precision) -> bool:
    stem = PurePosixPath(name).stem.lower()
    return bool(re.search(precision.stem or f"{re.escape(precision.name)}$", stem))
