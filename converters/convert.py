"""A model -> a bundle, or more variants of one: each by itself, proven or not written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qrank import disk
from qrank.bundle import MANIFEST, TOKENIZER, FileRecord, Manifest, Probes, Variant
from qrank.converters import makers
from qrank.converters.checkpoint import Checkpoint, of_fetched, read_checkpoint
from qrank.converters.fidelity import encode_pairs, make_probes, measure, own_probes
from qrank.converters.makers import Failed, Maker, Name
from qrank.converters.probes import calibration_pairs, read_pairs
from qrank.converters.publish import check_output, workshop
from qrank.converters.ready_find import find
from qrank.converters.ready_made import SUFFIXES, Asked, ReadyMade
from qrank.converters.resources import lacking, space, versions
from qrank.converters.tokenizer import text_tokenizer
from qrank.errors import (
    BundleError,
    ConversionError,
    FidelityError,
    MissingExtraError,
    QrankError,
)
from qrank.fidelity import Fidelity
from qrank.locate import Fetched, place
from qrank.work import Work

Progress = Callable[[str], object]
"""Called with what is being done, each time that changes."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        folder: the bundle's.
        manifest: the bundle's, with what was there before.
        failed: by a variant's name (a ready-made file's, where it cannot be read): why it is not in
            the bundle. What else was asked for is.
    """

    folder: Path
    manifest: Manifest
    failed: Failed


def convert(
    source: str,
    variants: Asked | None = None,
    output: Path | None = None,
    *,
    reference: str | None = None,
    family: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    force: bool = False,
    calibration: Path | None = None,
    progress: Progress = lambda step: None,
) -> Converted:
    """Convert a checkpoint, or take over ready-made files, and prove every variant.

    Each variant is made by itself: what is proven is kept, whatever becomes of the others.

    Args:
        source: a checkpoint's folder or hub id, or those of ready-made files, or one such file;
            see `qrank.locate.place`.
        variants: (format, precision) pairs to make, a precision of None being the default; those
            the bundle has already are kept. None: every format whose packages are installed and
            that the family is for, or of which there is a ready-made file.
        output: the bundle's folder; None: `NAME-qrank` in the working directory. A bundle of the
            same checkpoint gains the variants. While another conversion writes there, this one
            waits.
        reference: the checkpoint that ready-made files were made of, to prove them against: the
            bundle is then the checkpoint's. None: they are held against themselves.
        family: a card's name or file; None to match by config.json.
        revision: of the hub's repository.
        offline: do not ask the hub.
        force: replace the bundle at `output`, whatever it was made of; no other file is touched.
        calibration: JSON lines with "query" and "document", whose activations quantization looks
            at beside those of the pairs that come with qrank; None: at those alone.
        progress: told each step.

    Raises:
        QrankError: nothing that was asked for is in the bundle, or the source or the output cannot
            be used; see `qrank.errors`. What was at `output` is then as it was.
    """
    progress("reading the model")
    if output is not None:
        check_output(output.absolute(), force=force)
    with _disks_explained(Path.cwd()):
        model = _read(source, variants, reference, family, revision, offline, calibration)
    target = (output or Path(f"{model.checkpoint.name}-qrank")).absolute()
    check_output(target, model.sources, force=force)
    old = None if force else _existing(target, model.checkpoint)
    if old is not None and not _lacked(model.makers, old):
        return Converted(target, old, model.failed)
    with _disks_explained(target), workshop(target) as shop:
        # Another one, that it may have waited for, wrote here since.
        there = _replaced(target) if force else _existing(target, model.checkpoint)
        old = None if force else there
        wanted = _lacked(model.makers, old)
        made = _make(model, wanted, shop.new, old, progress)
        failed = {**model.failed, **made.failed}
        if not made.variants:
            if old is None or len(wanted) == len(model.makers):
                raise _nothing(failed)
            return Converted(target, old, failed)
        manifest = _with(made, model, shop.new, old)
        shop.publish(manifest, there, force=force)
    return Converted(target, manifest, failed)


@dataclass(frozen=True)
class _Model:
    """What is converted, and by what.

    Attributes:
        checkpoint: or what ready-made files are of.
        makers: of the variants asked for.
        failed: what cannot even be tried.
        pairs: that quantization looks at.
        verified: variants are held against the original.
        sources: what is read, and must not be written to.
    """

    checkpoint: Checkpoint
    makers: dict[Name, Maker]
    failed: Failed
    pairs: list[tuple[str, str]]
    verified: bool
    sources: list[Path]


def _read(
    source: str,
    asked: Asked | None,
    reference: str | None,
    family: str | None,
    revision: str | None,
    offline: bool,
    calibration: Path | None,
) -> _Model:
    """Find what is to be converted, and what can convert it."""
    found = find(source, asked, revision=revision, offline=offline)
    if isinstance(found, ReadyMade):
        if calibration is not None:
            raise ConversionError(f"--calibration is for quantizing; {source} is ready-made")
        model = _ready_made(found, reference, family, offline)
    else:
        if reference is not None:
            raise ConversionError(
                f"--reference is what ready-made files are proven against; {source} is none of "
                f"them: {', '.join(f'*{suffix}' for suffix in SUFFIXES.values())}"
            )
        model = _checkpoint(found, asked, family, calibration)
    if isinstance(where := place(source), Path):
        model.sources.append(where)
    return model


def _checkpoint(
    found: Fetched, asked: Asked | None, family: str | None, calibration: Path | None
) -> _Model:
    able, failed = makers.of_checkpoint(asked)
    if not able:
        raise _nothing(failed)
    # Never the user's alone: activations are wrong beyond what was seen, and theirs may be all
    # alike, none of them empty or long.
    pairs = calibration_pairs() + ([] if calibration is None else read_pairs(calibration))
    checkpoint = of_fetched(found, family)
    able, unfit = _suited(able, checkpoint, named=asked is not None)
    failed |= unfit
    if not able:
        raise _nothing(failed)
    sources = [found.folder] if calibration is None else [found.folder, calibration]
    return _Model(checkpoint, able, failed, pairs, True, sources)


def _ready_made(
    found: ReadyMade, reference: str | None, family: str | None, offline: bool
) -> _Model:
    able, failed = makers.of_files(found)
    if not able:
        raise _nothing(failed)
    sources = [taker.path for taker in found.takers]
    if reference is None:
        return _Model(found.describe(family), able, failed, [], False, sources)
    checkpoint = read_checkpoint(reference, family=family, offline=offline)
    return _Model(checkpoint, able, failed, [], True, [*sources, checkpoint.folder])


def _suited(
    able: Mapping[Name, Maker], checkpoint: Checkpoint, *, named: bool
) -> tuple[dict[Name, Maker], Failed]:
    """What makes variants in formats that the family is for, and why the others are not made."""
    card = checkpoint.card
    unfit = [name for name in able if name[0] in card.unsupported]
    reasons = {"-".join(n): f"models of family {card.name} cannot be run as {n[0]}" for n in unfit}
    if not named:
        for reason in reasons.values():
            log.warning("leaving it out: %s", reason)
    return (
        {name: maker for name, maker in able.items() if name not in unfit},
        {name: ConversionError(reason) for name, reason in reasons.items()},
    )


def _lacked(wanted: Mapping[Name, Maker], old: Manifest | None) -> dict[Name, Maker]:
    """What a bundle has not yet."""
    there = {} if old is None else old.variants
    return {name: maker for name, maker in wanted.items() if "-".join(name) not in there}


@dataclass(frozen=True)
class _Made:
    """Variants that were made and proven, what they are proven against, and what failed."""

    variants: list[Variant]
    probes: Probes | None
    failed: Failed


def _make(
    model: _Model,
    wanted: Mapping[Name, Maker],
    folder: Path,
    old: Manifest | None,
    progress: Progress,
) -> _Made:
    """Fill a folder with variants, each proven by itself."""
    checkpoint = model.checkpoint
    unfit = lacking(checkpoint, wanted, folder)
    failed: Failed = {"-".join(name): error for name, error in unfit.items()}
    wanted = {name: maker for name, maker in wanted.items() if name not in unfit}
    if not wanted:
        return _Made([], None, failed)
    tokenizer = folder / TOKENIZER
    original = json.loads(checkpoint.tokenizer.backend_tokenizer.to_str())
    text = json.dumps(text_tokenizer(original), ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(text, "utf-8")
    probes = None if old is None else old.probes
    if probes is None and model.verified:
        progress("running the fp32 reference")
        probes = make_probes(checkpoint, tokenizer)
    calibration = encode_pairs(model.pairs, tokenizer, checkpoint.family)
    variants = []
    for name, maker in wanted.items():
        variant = Variant(*name, {}, Fidelity(0.0, 0.0, 0.0, 0.0), {})
        try:
            progress(f"converting to {variant.name}")
            variant = _converted(variant, maker, checkpoint, calibration, folder)
            progress(f"proving {variant.name}")
            if probes is None:
                probes = own_probes(checkpoint, tokenizer, folder, variant)
            variants.append(replace(variant, fidelity=measure(folder, variant, probes)))
        # A library's errors share no base; whatever it is, it concerns this variant alone.
        except Exception as error:
            failed[variant.name] = _failure(error, variant, folder, space(checkpoint, name, maker))
            shutil.rmtree(folder / variant.name, ignore_errors=True)
    return _Made(variants, probes, failed)


def _converted(
    variant: Variant, maker: Maker, checkpoint: Checkpoint, calibration: Work, folder: Path
) -> Variant:
    """Make a variant's files.

    Raises:
        FidelityError: an empty one.
    """
    part = folder / variant.name
    part.mkdir()
    note = maker.convert(checkpoint, variant.precision, part, calibration)
    files = {
        path.relative_to(folder).as_posix(): FileRecord.of(path)
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    if not files or min(record.bytes for record in files.values()) == 0:
        raise FidelityError(f"the converter of {variant.name} wrote an empty file")
    return replace(variant, files=files, note=note, tools=versions(("qrank", *maker.MODULES)))


def _failure(error: Exception, variant: Variant, folder: Path, needed: int) -> QrankError:
    """What to say of a variant that was not made."""
    if isinstance(error, FidelityError | MissingExtraError):
        return error
    if (full := disk.explain(error, folder, needed)) is not None:
        return _caused(ConversionError(f"{variant.name} cannot be written: {full}"), error)
    if isinstance(error, QrankError):
        return error
    reason = " ".join(str(error).split())
    return _caused(
        ConversionError(f"{variant.name} cannot be made: {type(error).__name__}: {reason}"), error
    )


def _caused(error: QrankError, cause: Exception) -> QrankError:
    error.__cause__ = cause
    return error.with_traceback(cause.__traceback__)


def _nothing(failed: Failed) -> QrankError:
    """What to raise where nothing can be made."""
    errors = list(failed.values())
    if len(errors) == 1 or all(isinstance(error, MissingExtraError) for error in errors):
        return errors[0]
    worst = any(isinstance(error, FidelityError) for error in errors)
    reasons = "".join(f"\n  {name}: {error}" for name, error in failed.items())
    return (FidelityError if worst else ConversionError)(f"nothing could be made:{reasons}")


def _with(made: _Made, model: _Model, folder: Path, old: Manifest | None) -> Manifest:
    """The manifest of a bundle with new variants."""
    assert made.probes is not None  # variants were proven against them
    manifest = old or Manifest(
        name=model.checkpoint.name,
        family=model.checkpoint.family,
        source=model.checkpoint.source,
        files={TOKENIZER: FileRecord.of(folder / TOKENIZER)},
        probes=made.probes,
    )
    # Bundles of before did not say.
    manifest = replace(manifest, dimensions=model.checkpoint.dimensions)
    for variant in made.variants:
        manifest = manifest.with_variant(variant)
    return manifest


@contextmanager
def _disks_explained(path: Path) -> Iterator[None]:
    """Says of what the system refuses to write or read which disk it was, and that it was that.

    Raises:
        ConversionError: a disk is full, or the system refused.
    """
    try:
        yield
    except ConversionError:
        raise
    except (OSError, QrankError) as error:
        said = disk.reported(error, path)
        if said is None and isinstance(error, QrankError):
            raise
        raise ConversionError(said or str(error)) from error


def _existing(target: Path, checkpoint: Checkpoint) -> Manifest | None:
    """The bundle that gains variants; None where nothing is.

    Raises:
        BundleError: it is damaged.
        ConversionError: it is another checkpoint's.
    """
    if not (target / MANIFEST).is_file():
        return None
    old = Manifest.load(target)
    if old.source.fingerprint != checkpoint.source.fingerprint or old.family != checkpoint.family:
        raise ConversionError(
            f"{target} was converted from {old.source.id} (family {old.family.name}), and "
            f"{checkpoint.source.id} is another checkpoint; name another folder with -o, "
            "or --force to replace it"
        )
    return old


def _replaced(target: Path) -> Manifest | None:
    """The bundle that --force replaces, whatever it is; None where it cannot be read either."""
    try:
        return Manifest.load(target)
    except BundleError:
        return None
