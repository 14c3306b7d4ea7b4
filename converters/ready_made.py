"""Files that somebody converted already -> variants of a bundle.

A folder, a file or a hub repository of OpenVINO, ONNX or GGUF files needs no checkpoint beside it:
what the model is, its config.json and its tokenizer say. Without the checkpoint nobody knows how
close it is to the original; see `qrank.bundle.Probes`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

from qrank.backends import FORMATS
from qrank.converters.checkpoint import DESCRIPTION, WEIGHTS, Checkpoint, describe, fetch
from qrank.errors import ConversionError, ModelNotFoundError
from qrank.fidelity import TOLERANCES
from qrank.hub import download, is_hub_id, listing
from qrank.work import Work

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "gguf": ".gguf"}
"""What a format's files end with."""

_FOLDERS = ("onnx", "openvino")
"""Where in a repository such files lie, if not at its top."""

_NOT_MODELS = ("openvino_tokenizer", "openvino_detokenizer")

_WORDS = {
    "int8": ("int8", "quantized", "uint8", "qint8"),
    "int4": ("int4", "q4", "q4f16"),
    "fp16": ("fp16",),
}
"""What a precision is called in names of ONNX and OpenVINO files. GGUF files say it itself."""

_PLAIN = ("model", "openvino_model")
"""Names of files whose precision is not in their name."""

_ORDER = {
    "onnx": ("int8", "fp16", "fp32", "int4"),
    "openvino": ("int8", "fp16", "fp32", "int4"),
    "gguf": ("q4_k_m", "q8_0", "f16"),
}
"""Which of several files is taken where nobody says."""


@dataclass(frozen=True)
class Taker:
    """Makes a variant of one file; to the conversion, a converter as those of checkpoints are."""

    path: Path
    format: str

    @property
    def MODULES(self) -> Sequence[str]:  # noqa: N802 (as converters have it)
        """What taking it over and running it takes."""
        modules: Sequence[str] = self._module.MODULES
        return modules

    MEMORY = 0.0  # It is read as it lies on disk.

    @property
    def precision(self) -> str:
        """As its weights are stored."""
        found: str = self._module.precision(self.path)
        if found not in TOLERANCES:
            raise ConversionError(
                f"{self.path.name} is {found}, of which qrank knows no tolerance; known are: "
                f"{', '.join(TOLERANCES)}"
            )
        return found

    def convert(
        self, checkpoint: Checkpoint, precision: str, folder: Path, calibration: Work
    ) -> str:
        """Fill a variant's folder; see the converters of checkpoints."""
        if checkpoint.window is not None:
            raise ConversionError(
                f"config.json has sliding_window = {checkpoint.window}: whether {self.path.name} "
                "keeps to it beyond the length of the probes, nobody can see. Convert the "
                "checkpoint itself"
            )
        note: str = self._module.take(self.path, checkpoint, folder)
        return f"ready-made, from {self.path.name}" + (f"; {note}" if note else "")

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"qrank.converters.ready_{self.format}")


@dataclass(frozen=True)
class ReadyMade:
    """What a source holds.

    Attributes:
        folder: where config.json and the tokenizer are to be.
        identity: hub id, or a name.
        commit: the hub's; None of what is no hub's.
        takers: one a file.
    """

    folder: Path
    identity: str
    commit: str | None
    takers: tuple[Taker, ...]

    def describe(self, family: str | None) -> Checkpoint:
        """What the model is, without its weights.

        Raises:
            ModelNotFoundError: there is no config.json.
            QrankError: as of a checkpoint.
        """
        if not (self.folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{self.identity} holds no config.json, which says what {self._names} is: put the "
                "original model's config.json, tokenizer.json and tokenizer_config.json beside the "
                "file, or name that model with --reference"
            )
        return describe(self.folder, self.identity, self.commit, family, self._files)

    def _files(self) -> list[Path]:
        """Everything that a variant is made of."""
        return sorted(file for taker in self.takers for file in _parts(taker.path))

    @property
    def _names(self) -> str:
        return ", ".join(taker.path.name for taker in self.takers)


def find(
    source: str,
    variants: Sequence[tuple[str, str | None]] | None,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> ReadyMade | None:
    """The ready-made files of a source; None where it is a checkpoint, or nothing known.

    Args:
        source: a file, a folder, a hub id, or a file in a hub's repository (`owner/name/FILE`).
        variants: the formats wanted, with a precision or None; None: every format there is.
        revision: of the hub's repository.
        offline: use what was downloaded before only.

    Raises:
        ConversionError: a wanted format is not there, or which of several files is not clear.
        ModelNotFoundError: a hub's repository is not to be had.
    """
    path = Path(source)
    if path.is_file():
        if (format := _format(path.name)) is None:
            return None
        _only(variants, [format], source)
        folder, name = _home(path.parent), path.stem
        if path.stem.startswith(_PLAIN):
            name = folder.resolve().name
        return ReadyMade(folder, name, None, (Taker(path, format),))
    repository, file = _in_repository(source)
    if file is not None:
        format = _format(file)
        assert format is not None
        _only(variants, [format], source)
        folder = download(
            repository, [*DESCRIPTION, *_patterns(file)], revision=revision, offline=offline
        )
        return ReadyMade(folder, repository, folder.name, (Taker(folder / file, format),))
    if not path.is_dir() and not is_hub_id(source):
        return None
    folder, commit = fetch(source, [*DESCRIPTION, *WEIGHTS], revision=revision, offline=offline)
    if any(folder.glob("*.safetensors")):
        return None
    names = _names(folder) if commit is None or offline else listing(source, commit)
    candidates = _candidates(names)
    if not candidates:
        return None
    wanted = variants or [(format, None) for format in FORMATS if format in candidates]
    _only(variants, list(candidates), source)
    chosen = [
        (format, _choose(format, candidates[format], precision, source))
        for format, precision in wanted
    ]
    if commit is not None:
        files = [pattern for _, name in chosen for pattern in _patterns(name)]
        download(source, files, revision=commit, offline=offline)
    home = folder if commit else _home(folder)
    identity = source if commit else home.resolve().name
    takers = tuple(Taker(folder / name, format) for format, name in chosen)
    return ReadyMade(home, identity, commit, takers)


def _format(name: str) -> str | None:
    """The format of a file by its name."""
    suffix = PurePosixPath(name).suffix
    return next((format for format, known in SUFFIXES.items() if known == suffix), None)


def _home(folder: Path) -> Path:
    """Where config.json is to be: beside the files, or above their folder."""
    above = folder.resolve().name in _FOLDERS and not (folder / "config.json").is_file()
    return folder.resolve().parent if above else folder


def _in_repository(source: str) -> tuple[str, str | None]:
    """A hub id and the file in its repository: `owner/name/onnx/model.onnx`."""
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if file and is_hub_id(repository) and _format(file):
        return repository, file
    return source, None


def _names(folder: Path) -> list[str]:
    places = [folder, *(folder / name for name in _FOLDERS)]
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def _candidates(names: Iterable[str]) -> dict[str, list[str]]:
    """Format -> the files of it that may be a model."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path, format = PurePosixPath(name), _format(name)
        known_place = str(path.parent) in (".", *_FOLDERS)
        if format and known_place and path.stem not in _NOT_MODELS:
            found.setdefault(format, []).append(name)
    return found


def _only(
    variants: Sequence[tuple[str, str | None]] | None, formats: Sequence[str], source: str
) -> None:
    """See that what is wanted is there."""
    for format, _ in variants or ():
        if format not in formats:
            raise ConversionError(
                f"{source} holds ready-made files of {', '.join(formats)} and none of {format}; "
                "converting to it takes the checkpoint"
            )


def _choose(format: str, names: list[str], precision: str | None, source: str) -> str:
    """The file to take of several.

    Raises:
        ConversionError: none is called as one would expect.
    """
    if len(names) == 1:
        return names[0]
    for wanted in _ORDER[format] if precision is None else (precision,):
        if fitting := [name for name in names if _called(name, wanted)]:
            return min(fitting, key=lambda name: (len(name), name))
    raise ConversionError(
        f"{source} holds several {format} files: {', '.join(names)}; name one, as in "
        f"{source}/{names[0]}"
    )


def _called(name: str, precision: str) -> bool:
    stem = PurePosixPath(name).stem.lower()
    if precision == "fp32":
        return stem in _PLAIN
    if PurePosixPath(name).suffix == SUFFIXES["gguf"]:
        return stem.endswith(precision)
    return bool(set(_WORDS.get(precision, ())) & set(re.split(r"[-_.]", stem)))


def _patterns(name: str) -> list[str]:
    """A file of a repository, and what its weights may lie in."""
    if _format(name) == "onnx":
        return [f"{name}*"]
    return [name, f"{name.removesuffix('.xml')}.bin"]


def _parts(path: Path) -> list[Path]:
    """A file on disk, and what its weights lie in."""
    patterns = [path.name, *_patterns(path.name)]
    return sorted({file for pattern in patterns for file in path.parent.glob(pattern)})
