"""Prebuilt files (already converted by someone) -> variants of a bundle.

A folder, file or hub repository of OpenVINO, ONNX or GGUF files needs no checkpoint: config.json
and the tokenizer describe the model. Without the checkpoint, the fidelity to the original is
unknown; see `qrank.bundle.manifest.Probes`.
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
"""(format, precision) pairs; None: any precision."""


@dataclass(frozen=True)
class Importer:
    """Makes a variant from one file; has the same interface as a checkpoint converter.

    Attributes:
        path: the file.
        format: its format.
        asked: the requested precision; None: any.
    """

    path: Path
    format: str
    asked: str | None = None

    @property
    def MODULES(self) -> Sequence[str]:  # noqa: N802 (as converters have it)
        """Packages needed to import and run the file."""
        modules: Sequence[str] = self._module.MODULES
        return modules

    MEMORY = 0.0  # The file is taken over as stored.

    @property
    def bytes(self) -> int:
        """Total size of the file and the files that hold its weights."""
        return sum(path.stat().st_size for path in _parts(self.path))

    @property
    def precision(self) -> str:
        """The precision that the weights are stored in.

        Raises:
            ConversionError: the file cannot be read, or its precision is not the requested one or
                has no tolerance.
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
        refuse_windows(checkpoint, self.path.name)
        note: str = self._module.import_file(self.path, checkpoint, folder)
        return f"prebuilt, from {self.path.name}" + (f"; {note}" if note else "")

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(formats()[self.format].importer)


@dataclass(frozen=True)
class Prebuilt:
    """The prebuilt files of a source.

    Attributes:
        folder: where config.json and the tokenizer are expected.
        identity: hub id or a name.
        commit: the hub's commit; None if not from the hub.
        importers: one per file.
        missing: the requested variants that are missing, and why.
    """

    folder: Path
    identity: str
    commit: str | None
    importers: tuple[Importer, ...]
    missing: dict[str, QrankError] = field(default_factory=dict)

    def describe(self, family: str | None) -> Checkpoint:
        """The model as a checkpoint without weights.

        Raises:
            ModelNotFoundError: there is no config.json.
            QrankError: as for a checkpoint.
        """
        if not (self.folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{self.identity} holds no config.json, which says what {self._names} is: put the "
                "original model's config.json, tokenizer.json and tokenizer_config.json beside the "
                "file, or name that model with --reference"
            )
        return describe(self.folder, self.identity, self.commit, family, self._files)

    def _files(self) -> list[Path]:
        """All files that the variants are made from."""
        return sorted(file for importer in self.importers for file in _parts(importer.path))

    @property
    def _names(self) -> str:
        return ", ".join(importer.path.name for importer in self.importers)


def refuse_windows(checkpoint: Checkpoint, graph: str) -> None:
    """Refuse a graph made by someone else if its model has a sliding window.

    Raises:
        ConversionError: it has one.
    """
    if checkpoint.window is not None:
        raise ConversionError(
            f"config.json has sliding_window = {checkpoint.window}: whether {graph} keeps to it "
            "beyond the length of the probes, nobody can see. Convert the checkpoint itself"
        )


def importable() -> dict[str, Format]:
    """The formats whose prebuilt files can be imported."""
    return {name: format for name, format in formats().items() if format.importer}


def format_of(name: str) -> str | None:
    """The format of a file by its suffix; None if unknown."""
    suffix = PurePosixPath(name).suffix
    return next((name for name, known in importable().items() if known.suffix == suffix), None)


def patterns(name: str) -> list[str]:
    """Name patterns of a file in a repository and the files that may hold its weights."""
    format = format_of(name)
    weights = "" if format is None else formats()[format].weights
    stem = name.removesuffix(PurePosixPath(name).suffix)
    return [name, weights.format(name=name, stem=stem)] if weights else [name]


def _parts(path: Path) -> list[Path]:
    """A file on disk and the files that hold its weights."""
    wanted = [path.name, *patterns(path.name)]
    found = {file for pattern in wanted for file in path.parent.glob(pattern)}
    return sorted(file for file in found if file.is_file())
