"""What makes variants: a format's converter, or the importer of a prebuilt file."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from qrank.backends import FORMATS
from qrank.bundle.fidelity import TOLERANCES
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.prebuilt import Prebuilt, Request
from qrank.errors import ConversionError, FidelityError, MissingExtraError, QrankError
from qrank.system.extras import EXTRA_OF, installed, need, pip_line

Name = tuple[str, str]
"""A variant's format and precision."""

Failed = dict[str, QrankError]
"""By what a variant is called: why it was not made."""

log = logging.getLogger("qrank")


class Maker(Protocol):
    """Fills a variant's folder: a converter, or the importer of a prebuilt file."""

    @property
    def MODULES(self) -> Sequence[str]:  # noqa: N802 (a converter's constant)
        """What making and running the variant takes."""

    @property
    def MEMORY(self) -> float:  # noqa: N802
        """The least memory it takes, in times of the model's size in fp32."""

    def convert(
        self, checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
        """Write the variant's files; gives a note for the manifest, "" mostly."""


def converter(format: str) -> ModuleType:
    """The converter module of a format."""
    return importlib.import_module(f"qrank.converters.{format}.export")


def default_precision(format: str) -> str:
    """What a format is made in where nobody says."""
    precision: str = converter(format).PRECISIONS[0]
    return precision


def extras_for(format: str) -> str:
    """Extras of qrank that bring what a format still wants, as pip takes them: "convert,gguf"."""
    return ",".join(sorted({EXTRA_OF[m] for m in converter(format).MODULES if not installed(m)}))


def formats_at_hand() -> list[str]:
    """Formats whose every module is installed."""
    return [f for f in FORMATS if all(installed(m) for m in converter(f).MODULES)]


def of_checkpoint(asked: Request | None) -> tuple[dict[Name, Maker], Failed]:
    """What makes each variant of a checkpoint, and what cannot be made for want of packages.

    Args:
        asked: formats and precisions; None: the default of each whose packages are installed.

    Raises:
        ConversionError: a format has no such precision.
    """
    if asked is None:
        # With none at hand, the first says what is missing.
        formats = formats_at_hand() or FORMATS
        for absent in sorted(set(FORMATS) - set(formats)):
            log.warning("leaving out %s: %s", absent, pip_line(extras_for(absent)))
        asked = [(format, None) for format in formats]
    makers: dict[Name, Maker] = {}
    failed: Failed = {}
    for format, named in asked:
        if format not in FORMATS:
            raise ConversionError(f"there is no format {format!r}; there are: {', '.join(FORMATS)}")
        module, precision = converter(format), named or default_precision(format)
        if precision not in module.PRECISIONS:
            raise ConversionError(
                f"{format} has no {precision}; it has: {', '.join(module.PRECISIONS)}"
            )
        maker = cast(Maker, module)
        try:
            _require(maker)
            makers[format, precision] = maker
        except QrankError as error:
            failed[f"{format}-{precision}"] = error
    return makers, failed


def of_files(found: Prebuilt) -> tuple[dict[Name, Maker], Failed]:
    """What makes each variant of prebuilt files, the most exact one first; and what cannot."""
    makers: dict[Name, Maker] = {}
    failed: Failed = dict(found.missing)
    for importer in found.importers:
        try:
            _require(importer)
            makers[importer.format, importer.precision] = importer
        except QrankError as error:
            failed[importer.path.name] = error
    ordered = sorted(makers.items(), key=lambda item: TOLERANCES[item[0][1]].share)
    return dict(ordered), failed


def _require(maker: Maker) -> None:
    for name in maker.MODULES:
        if not installed(name):
            need(name)


def nothing(failed: Failed) -> QrankError:
    """What to raise where nothing can be made."""
    errors = list(failed.values())
    if len(errors) == 1 or all(isinstance(error, MissingExtraError) for error in errors):
        return errors[0]
    worst = any(isinstance(error, FidelityError) for error in errors)
    reasons = "".join(f"\n  {name}: {error}" for name, error in failed.items())
    return (FidelityError if worst else ConversionError)(f"nothing could be made:{reasons}")
