"""What makes variants: a format's converter, or the importer of a prebuilt file."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from qrank.backends import formats, spec, tolerance
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.prebuilt import Prebuilt, Request
from qrank.errors import ConversionError, FidelityError, MissingExtraError, QrankError
from qrank.system.extras import EXTRA_OF, installed, need, pip_line

Name = tuple[str, str]
"""A variant's format and precision."""

Failed = dict[str, QrankError]
"""Why a variant was not made, by its name."""

log = logging.getLogger("qrank")


class Maker(Protocol):
    """Fills a variant's folder: a converter or the importer of a prebuilt file."""

    @property
    def MODULES(self) -> Sequence[str]:  # noqa: N802 (a converter's constant)
        """Modules needed to make and run the variant."""

    @property
    def MEMORY(self) -> float:  # noqa: N802
        """The minimum memory needed, as a multiple of the model's size in fp32."""

    def convert(
        self, checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
        """Write the variant's files; return a note for the manifest, mostly ""."""


def converter(format: str, exporter: str | None = None) -> ModuleType:
    """The module that converts checkpoints to a format.

    Args:
        format: its name.
        exporter: another program that does it, by its name in the format; None: qrank itself.

    Raises:
        ConversionError: the module cannot be imported; it may belong to another package.
    """
    known = formats()[format]
    name = known.converter if exporter is None else known.exporters[exporter]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConversionError(f"the converter {name} cannot be imported: {error}") from error


def _extra_of(format: str, module: str) -> str:
    """The extra that installs a module needed to make or run a format; "" if there is none."""
    backend = spec(format)
    return (
        backend.extra if module in backend.modules else EXTRA_OF.get(module.partition(".")[0], "")
    )


def obstacle(format: str) -> str:
    """What prevents making and running a format, or the command that helps; "" if nothing does."""
    try:
        missing = [module for module in converter(format).MODULES if not installed(module)]
    except ConversionError as error:
        return str(error)
    extras = sorted({_extra_of(format, module) for module in missing} - {""})
    if missing and not extras:
        return f"{', '.join(missing)} is not installed"
    return pip_line(",".join(extras)) if extras else ""


def of_checkpoint(
    asked: Request | None, exporter: str | None = None
) -> tuple[dict[Name, Maker], Failed]:
    """The maker of each variant of a checkpoint, and variants whose packages are missing.

    Args:
        asked: formats and precisions; None: the default precision of each format that is made
            unasked and whose packages are installed, or of each that the exporter writes.
        exporter: another program that converts; None: qrank itself.

    Raises:
        ConversionError: there is no such format, the format has no such precision, or the exporter
            does not write it.
    """
    if exporter is not None:
        asked = _exported(asked, exporter)
    if asked is None:
        obstacles = {name: obstacle(name) for name, format in formats().items() if format.unasked}
        # If no format can be made, keep all: their errors say what is missing.
        at_hand = [format for format, what in obstacles.items() if not what] or list(obstacles)
        for absent in sorted(set(obstacles) - set(at_hand)):
            log.warning("leaving out %s: %s", absent, obstacles[absent])
        asked = [(format, None) for format in at_hand]
    makers: dict[Name, Maker] = {}
    failed: Failed = {}
    for format, named in asked:
        if format not in (known := formats()):
            raise ConversionError(f"there is no format {format!r}; there are: {', '.join(known)}")
        precision = named or known[format].made[0]
        if precision not in known[format].made:
            raise ConversionError(
                f"{format} has no {precision}; it has: {', '.join(known[format].made)}"
            )
        try:
            maker = cast(Maker, converter(format, exporter))
            _require(format, maker)
            makers[format, precision] = maker
        except QrankError as error:
            failed[f"{format}-{precision}"] = error
    return makers, failed


def _exported(asked: Request | None, exporter: str) -> Request:
    """The request, or every format that an exporter writes if there is none.

    Raises:
        ConversionError: the exporter is unknown, or does not write a requested format.
    """
    able = [name for name, format in formats().items() if exporter in format.exporters]
    if not able:
        known = sorted({name for format in formats().values() for name in format.exporters})
        raise ConversionError(f"there is no exporter {exporter!r}; there are: {', '.join(known)}")
    others = [format for format, _ in asked or () if format in formats() and format not in able]
    if others:
        raise ConversionError(
            f"the exporter {exporter} writes {', '.join(able)} and not {', '.join(others)}"
        )
    return asked or [(format, None) for format in able]


def of_files(found: Prebuilt) -> tuple[dict[Name, Maker], Failed]:
    """The maker of each variant of prebuilt files, most exact first; and what cannot be made."""
    makers: dict[Name, Maker] = {}
    failed: Failed = dict(found.missing)
    for importer in found.importers:
        try:
            _require(importer.format, importer)
            makers[importer.format, importer.precision] = importer
        except QrankError as error:
            failed[importer.path.name] = error
    ordered = sorted(makers.items(), key=lambda item: tolerance(*item[0]).share)
    return dict(ordered), failed


def _require(format: str, maker: Maker) -> None:
    for name in maker.MODULES:
        if not installed(name):
            if not (extra := _extra_of(format, name)):
                raise ConversionError(f"{format} takes {name}, which is not installed")
            need(name, extra=extra)


def nothing(failed: Failed) -> QrankError:
    """The error to raise if nothing can be made."""
    errors = list(failed.values())
    if len(errors) == 1 or all(isinstance(error, MissingExtraError) for error in errors):
        return errors[0]
    worst = any(isinstance(error, FidelityError) for error in errors)
    reasons = "".join(f"\n  {name}: {error}" for name, error in failed.items())
    return (FidelityError if worst else ConversionError)(f"nothing could be made:{reasons}")
