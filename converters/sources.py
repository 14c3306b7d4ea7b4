"""Find what is converted (a checkpoint or prebuilt files) and what can convert it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qrank.backends import formats
from qrank.bundle.agreement import RankingData
from qrank.bundle.locate import Fetched, place
from qrank.converters import makers
from qrank.converters.checkpoint.card import Card, cards
from qrank.converters.checkpoint.probes import calibration_pairs, read_pairs
from qrank.converters.checkpoint.read import Checkpoint, of_fetched, read_checkpoint
from qrank.converters.makers import Failed, Maker, Name
from qrank.converters.prebuilt import Prebuilt, Request, importable
from qrank.converters.prebuilt_source import find
from qrank.errors import ConversionError


@dataclass(frozen=True)
class Model:
    """A model to convert and the makers of its variants.

    Attributes:
        checkpoint: the checkpoint, or the model that prebuilt files were made from.
        makers: makers of the requested variants.
        failed: variants that cannot even be tried.
        pairs: pairs for calibration.
        verified: whether variants are compared with the original.
        sources: paths that are read and must not be written to.
        ranking: the user's own ranking data; None: qrank's.
    """

    checkpoint: Checkpoint
    makers: dict[Name, Maker]
    failed: Failed
    pairs: list[tuple[str, str]]
    verified: bool
    sources: list[Path]
    ranking: RankingData | None = None


def read(
    source: str,
    asked: Request | None,
    reference: str | None,
    family: str | None,
    revision: str | None,
    offline: bool,
    calibration: Path | None,
    exporter: str | None,
    ranking: RankingData | None = None,
) -> Model:
    """Find what to convert and what can convert it.

    Args:
        source: the source as the user gave it.
        asked: formats and precisions; None: all available.
        reference: as for `convert`, and so are the others.
        family: a card's name or file.
        revision: revision of the hub repository.
        offline: do not contact the hub.
        calibration: a file of pairs.
        exporter: another program that converts; None: qrank itself.
        ranking: the user's own ranking data; None: qrank's.

    Raises:
        QrankError: no requested variant can be made, or the source cannot be read.
    """
    found = find(source, asked, family=family, revision=revision, offline=offline)
    if isinstance(found, Prebuilt):
        if calibration is not None:
            raise ConversionError(f"--calibration is for quantizing; {source} is prebuilt")
        if exporter is not None:
            raise ConversionError(f"--exporter converts a checkpoint; {source} is prebuilt")
        model = _prebuilt(found, reference, family, offline)
    else:
        if reference is not None:
            raise ConversionError(
                f"--reference is what prebuilt files are proven against; {source} is none of "
                f"them: {', '.join(f'*{format.suffix}' for format in importable().values())}"
            )
        model = _checkpoint(found, asked, family, calibration, exporter)
    if isinstance(where := place(source), Path):
        model.sources.append(where)
    if ranking is None:
        return model
    if not model.verified:
        raise ConversionError(
            f"--ranking-data compares with the original, and {source} is prebuilt: name the "
            "original by --reference"
        )
    return replace(model, ranking=ranking, sources=[*model.sources, *ranking.files])


def families() -> dict[str, str]:
    """The families that come with qrank: name -> which models they read."""
    return {card.name: card.about for card in cards()}


def _checkpoint(
    found: Fetched,
    asked: Request | None,
    family: str | None,
    calibration: Path | None,
    exporter: str | None,
) -> Model:
    able, failed = makers.of_checkpoint(asked, exporter)
    if not able:
        raise makers.nothing(failed)
    # Never only the user's pairs: they may be too similar, with no empty or long ones, and
    # activations outside the calibrated range are wrong.
    pairs = calibration_pairs() + ([] if calibration is None else read_pairs(calibration))
    checkpoint = of_fetched(found, family)
    able, unfit = _suited(able, checkpoint.card)
    failed |= unfit
    if not able:
        raise makers.nothing(failed)
    sources = [found.folder] if calibration is None else [found.folder, calibration]
    return Model(checkpoint, able, failed, pairs, True, sources)


def _prebuilt(found: Prebuilt, reference: str | None, family: str | None, offline: bool) -> Model:
    able, failed = makers.of_files(found)
    if not able:
        raise makers.nothing(failed)
    sources = [importer.path for importer in found.importers]
    if reference is None:
        return Model(found.describe(family), able, failed, [], False, sources)
    checkpoint = read_checkpoint(reference, family=family, offline=offline)
    return Model(checkpoint, able, failed, [], True, [*sources, checkpoint.folder])


def _suited(able: Mapping[Name, Maker], card: Card) -> tuple[dict[Name, Maker], Failed]:
    """The makers whose formats the family supports, and errors for the others."""
    suited = ", ".join(name for name in formats() if name not in card.unsupported)
    failed: Failed = {
        "-".join(name): ConversionError(
            f"models of family {card.name} cannot be run as {name[0]}; they run as {suited}"
        )
        for name in able
        if name[0] in card.unsupported
    }
    return {n: maker for n, maker in able.items() if "-".join(n) not in failed}, failed
