"""Convert a model to a bundle or add variants to one: each variant is proven or not written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qrank.bundle.agreement import LEAST, RankingData
from qrank.bundle.manifest import MANIFEST, TOKENIZER, FileRecord, Manifest, Variant
from qrank.converters.makers import Failed, Maker, Name, nothing
from qrank.converters.prebuilt import Request
from qrank.converters.publish import check_output, disks_explained, workshop
from qrank.converters.sources import Model, read
from qrank.converters.variants import Existing, Made, Progress, make
from qrank.errors import BundleError, ConversionError, InputError


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        folder: the bundle's folder.
        manifest: the bundle's manifest, including earlier variants.
        failed: why a variant is not in the bundle, by variant name (by file name if a prebuilt file
            cannot be read). Every other requested variant is in it. A variant that was in it before
            stays in it, even if it is not proven again.
    """

    folder: Path
    manifest: Manifest
    failed: Failed


def convert(
    source: str,
    variants: Request | None = None,
    output: Path | None = None,
    *,
    reference: str | None = None,
    family: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    force: bool = False,
    calibration: Path | None = None,
    exporter: str | None = None,
    first: bool = False,
    ranking: RankingData | None = None,
    min_agreement: float = LEAST,
    progress: Progress = lambda step: None,
) -> Converted:
    """Convert a checkpoint, or import prebuilt files, and prove every variant.

    Variants are independent: each proven one is kept, even if others fail.

    Args:
        source: folder or hub id of a checkpoint or of prebuilt files, or one prebuilt file; see
            `qrank.bundle.locate.place`.
        variants: (format, precision) pairs to make; a precision of None is the default. Variants
            the bundle already has are kept, and proven on rankings if they were not. None: every
            format that the family supports, that is made unasked (MLX is on Macs alone) and whose
            packages are installed, or every format with a prebuilt file.
        output: the bundle's folder; None: `NAME-qrank` in the working directory. The variants are
            added to an existing bundle of the same checkpoint. Waits while another conversion
            writes there.
        reference: the checkpoint that prebuilt files were made from, to prove them against; the
            bundle then belongs to that checkpoint. None: the most exact file is the reference.
        family: a card's name or file; None to match by config.json.
        revision: revision of the hub repository.
        offline: do not contact the hub.
        force: replace the bundle at `output`, whatever it was made from; no other file is touched.
        calibration: JSON lines with "query" and "document", used for calibration in addition to the
            pairs that come with qrank; None: only those.
        exporter: another program that converts, such as "optimum" (optimum-intel) for OpenVINO;
            None: qrank itself. Everything after it is the same.
        first: `variants` are alternatives: make the first that can be made, unless the bundle
            already has one of them.
        ranking: queries and passages on which variants must rank like the original; None: those
            that come with qrank.
        min_agreement: least agreement of a variant's rankings with the original's: `ndcg` of
            `qrank.bundle.agreement.Agreement`. Variants below it are refused.
        progress: called with each step.

    Raises:
        QrankError: none of the requested variants is in the bundle, or the source or the output is
            unusable; see `qrank.errors`. `output` is then unchanged.
    """
    if variants is not None and not variants:
        raise InputError("variants is empty; name some, or None for all")
    if not -1 <= min_agreement <= 1:
        raise InputError(f"min_agreement is {min_agreement}; an agreement is at most 1")
    progress("reading the model")
    with disks_explained(output or Path.cwd()):
        if output is not None:
            check_output(output.absolute(), force=force)
        model = read(
            source, variants, reference, family, revision, offline, calibration, exporter, ranking
        )
        target = (output or Path(f"{model.checkpoint.name}-qrank")).absolute()
        check_output(target, model.sources, force=force)
        old = None if force else _existing(target, model, exporter)
    if old is not None and not _lacked(model.makers, old, first) and not _unranked(model, old):
        return Converted(target, old, model.failed)
    with disks_explained(target), workshop(target) as shop:
        # This run may have waited for another conversion, which wrote here in the meantime.
        there = _replaced(target) if force else _existing(target, model, exporter)
        old = None if force else there
        wanted = _lacked(model.makers, old, first)
        bundle = None if old is None else Existing(target, old, _unranked(model, old))
        made = make(model, wanted, shop.new, bundle, min_agreement, progress, first=first)
        failed = {**model.failed, **made.failed}
        if not made.variants:
            if old is None or len(wanted) == len(model.makers):
                raise nothing(failed)
            return Converted(target, old, failed)
        manifest = _with(made, model, shop.new, old)
        shop.publish(manifest, there, force=force)
    return Converted(target, manifest, failed)


def _lacked(wanted: Mapping[Name, Maker], old: Manifest | None, first: bool) -> dict[Name, Maker]:
    """The wanted variants that a bundle does not have yet; none if it has one of alternatives."""
    there = {} if old is None else old.variants
    lacked = {name: maker for name, maker in wanted.items() if "-".join(name) not in there}
    return {} if first and len(lacked) < len(wanted) else lacked


def _unranked(model: Model, old: Manifest) -> list[Variant]:
    """The wanted variants of a bundle to prove on rankings: those that were not, or on own data."""
    there = [old.variants[key] for name in model.makers if (key := "-".join(name)) in old.variants]
    return [
        variant
        for variant in there
        if model.verified and (variant.ranking is None or model.ranking is not None)
    ]


def _with(made: Made, model: Model, folder: Path, old: Manifest | None) -> Manifest:
    """The bundle's manifest with the new variants added."""
    assert made.probes is not None  # variants were proven against them
    manifest = old or Manifest(
        name=model.checkpoint.name,
        family=model.checkpoint.family,
        source=model.checkpoint.source,
        files={TOKENIZER: FileRecord.of(folder / TOKENIZER)},
        probes=made.probes,
    )
    # Older bundles record neither the dimensions nor the description.
    manifest = replace(
        manifest,
        dimensions=model.checkpoint.dimensions,
        description=model.checkpoint.description(),
        ranking=made.ranking or manifest.ranking,
    )
    for variant in made.variants:
        manifest = manifest.with_variant(variant)
    return manifest


def _existing(target: Path, model: Model, exporter: str | None) -> Manifest | None:
    """The manifest of the bundle to add variants to; None if there is no bundle.

    Raises:
        BundleError: the bundle is damaged.
        ConversionError: the bundle belongs to another checkpoint, or has a wanted variant that the
            exporter did not make.
    """
    checkpoint = model.checkpoint
    if not (target / MANIFEST).is_file():
        return None
    old = Manifest.load(target)
    if old.source.fingerprint != checkpoint.source.fingerprint or old.family != checkpoint.family:
        raise ConversionError(
            f"{target} was converted from {old.source.id} (family {old.family.name}), and "
            f"{checkpoint.source.id} is another checkpoint; name another folder with -o, "
            "or --force to replace it"
        )
    there = [old.variants[name] for name in map("-".join, model.makers) if name in old.variants]
    others = [variant.name for variant in there if exporter and exporter not in variant.note]
    if others:
        raise ConversionError(
            f"{target} already has {', '.join(others)}, not made by {exporter}; name another "
            "folder with -o, or --force to replace the bundle"
        )
    return old


def _replaced(target: Path) -> Manifest | None:
    """The manifest of the bundle that --force replaces; None if there is none or it is damaged."""
    try:
        return Manifest.load(target)
    except BundleError:
        return None
