"""A model -> a bundle, or more variants of one: each by itself, proven or not written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qrank.bundle.manifest import MANIFEST, TOKENIZER, FileRecord, Manifest
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.makers import Failed, Maker, Name, nothing
from qrank.converters.prebuilt import Request
from qrank.converters.publish import check_output, workshop
from qrank.converters.sources import Model, read
from qrank.converters.variants import Made, Progress, make
from qrank.errors import BundleError, ConversionError, InputError, QrankError
from qrank.system import disk


@dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        folder: the bundle's.
        manifest: the bundle's, with what was there before.
        failed: by a variant's name (a prebuilt file's, where it cannot be read): why it is not in
            the bundle. What else was asked for is.
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
    progress: Progress = lambda step: None,
) -> Converted:
    """Convert a checkpoint, or import prebuilt files, and prove every variant.

    Each variant is made by itself: what is proven is kept, whatever becomes of the others.

    Args:
        source: a checkpoint's folder or hub id, or those of prebuilt files, or one such file;
            see `qrank.bundle.locate.place`.
        variants: (format, precision) pairs to make, a precision of None being the default; those
            the bundle has already are kept. None: every format whose packages are installed and
            that the family is for, or of which there is a prebuilt file.
        output: the bundle's folder; None: `NAME-qrank` in the working directory. A bundle of the
            same checkpoint gains the variants. While another conversion writes there, this one
            waits.
        reference: the checkpoint that prebuilt files were made of, to prove them against: the
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
    if variants is not None and not variants:
        raise InputError("variants is empty; name some, or None for all")
    progress("reading the model")
    with _disks_explained(output or Path.cwd()):
        if output is not None:
            check_output(output.absolute(), force=force)
        model = read(source, variants, reference, family, revision, offline, calibration)
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
        made = make(model, wanted, shop.new, old, progress)
        failed = {**model.failed, **made.failed}
        if not made.variants:
            if old is None or len(wanted) == len(model.makers):
                raise nothing(failed)
            return Converted(target, old, failed)
        manifest = _with(made, model, shop.new, old)
        shop.publish(manifest, there, force=force)
    return Converted(target, manifest, failed)


def _lacked(wanted: Mapping[Name, Maker], old: Manifest | None) -> dict[Name, Maker]:
    """What a bundle has not yet."""
    there = {} if old is None else old.variants
    return {name: maker for name, maker in wanted.items() if "-".join(name) not in there}


def _with(made: Made, model: Model, folder: Path, old: Manifest | None) -> Manifest:
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
