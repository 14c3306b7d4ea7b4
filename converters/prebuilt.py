"""Files that somebody converted already -> variants of a bundle.

A folder, a file or a hub repository of OpenVINO, ONNX or GGUF files needs no checkpoint beside it:
what the model is, its config.json and its tokenizer say. Without the checkpoint nobody knows how
close it is to the original; see `qrank.bundle.manifest.Probes`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType

from qrank.backends import Format, formats
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.read import Checkpoint, describe
from qrank.errors import ConversionError, ModelNotFoundError, QrankError

Request = Sequence[tuple[str, str | None]]
"""Formats with a precision each, None being whatever there is."""


@dataclass(frozen=True)
class Importer:
    """Makes a variant of one file; to the conversion it is a converter like those of checkpoints.

    Attributes:
        path: the file.
        format: its format.
        asked: the precision it was asked to be; None: any.
    """

    path: Path
    format: str
    asked: str | None = None

    @property
    def MODULES(self) -> Sequence[str]:  # noqa: N802 (as converters have it)
        """Packages that importing it and running it need."""
        modules: Sequence[str] = self._module.MODULES
        return modules

    MEMORY = 0.0  # It is read as it lies on disk.

    @property
    def bytes(self) -> int:
        """Size of the file, and of those beside it that its weights lie in."""
        return sum(path.stat().st_size for path in _parts(self.path))

    @property
    def precision(self) -> str:
        """As its weights are stored.

        Raises:
            ConversionError: the file cannot be read, or is of another precision than asked for, or
                of one that has no tolerance.
        """
        found: str = self._module.precision(self.path)
        if self.asked not in (None, found):
            raise ConversionError(f"{self.path.name} is {found}, and not {self.asked}")
        format = formats()[self.format]
        if format.precision(found) is None:
            raise ConversionError(
                f"{self.path.name} is {found}, of which qrank knows no tolerance; known are: "
                f"{', '.join(precision.name for precision in format.precisions)}"
            )
        return found

    def convert(
        self, checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
        """Fill a variant's folder; see the converters of checkpoints."""
        if checkpoint.window is not None:
            raise ConversionError(
                f"config.json has sliding_window = {checkpoint.window}: whether {self.path.name} "
                "keeps to it beyond the length of the probes, nobody can see. Convert the "
                "checkpoint itself"
            )
        note: str = self._module.import_file(self.path, checkpoint, folder)
        return f"prebuilt, from {self.path.name}" + (f"; {note}" if note else "")

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(formats()[self.format].importer)


@dataclass(frozen=True)
class Prebuilt:
    """What a source holds.

    Attributes:
        folder: where config.json and the tokenizer are to be.
        identity: hub id, or a name.
        commit: the hub's; None of what is no hub's.
        importers: one a file.
        missing: what was asked for, and why it is not there.
    """

    folder: Path
    identity: str
    commit: str | None
    importers: tuple[Importer, ...]
    missing: dict[str, QrankError] = field(default_factory=dict)

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
        return sorted(file for importer in self.importers for file in _parts(importer.path))

    @property
    def _names(self) -> str:
        return ", ".join(importer.path.name for importer in self.importers)


def importable() -> dict[str, Format]:
    """The formats whose prebuilt files can be taken over."""
    return {name: format for name, format in formats().items() if format.importer}


def format_of(name: str) -> str | None:
    """The format of a file by its name."""
    suffix = PurePosixPath(name).suffix
    return next((name for name, known in importable().items() if known.suffix == suffix), None)


def patterns(name: str) -> list[str]:
    """A file of a repository, and what its weights may lie in."""
    format = format_of(name)
    weights = "" if format is None else formats()[format].weights
    stem = name.removesuffix(PurePosixPath(name).suffix)
    return [name, weights.format(name=name, stem=stem)] if weights else [name]


def _parts(path: Path) -> list[Path]:
    """A file on disk, and what its weights lie in."""
    wanted = [path.name, *patterns(path.name)]
    found = {file for pattern in wanted for file in path.parent.glob(pattern)}
    return sorted(file for file in found if file.is_file())
