"""Make and prove variants independently: a failure does not affect the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qrank.backends.isolation import Worker
from qrank.bundle.agreement import Reference
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import TOKENIZER, FileRecord, Manifest, Probes, Variant
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.ids import encode_pairs
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.checkpoint.reference import Original
from qrank.converters.fidelity import make_probes, measure, own_probes
from qrank.converters.makers import Failed, Maker, Name
from qrank.converters.ranking import Ranking, make_ranking
from qrank.converters.resources import lacking, space, versions
from qrank.converters.sources import Model
from qrank.errors import ConversionError, FidelityError, MissingExtraError, QrankError
from qrank.system import disk
from qrank.system.steps import Step

Progress = Callable[[str], object]
"""Called with the current step whenever it changes: a text, or a `qrank.system.steps.Step`."""


@dataclass(frozen=True)
class Made:
    """Variants that were made and proven, what they are proven against, and failures."""

    variants: list[Variant]
    probes: Probes | None
    failed: Failed
    ranking: Reference | None = None


@dataclass(frozen=True)
class Existing:
    """The bundle that variants are made for.

    Attributes:
        folder: its folder.
        manifest: its manifest.
        unranked: its variants that are proven on rankings now; their files stay.
    """

    folder: Path
    manifest: Manifest
    unranked: list[Variant]


def make(
    model: Model,
    wanted: Mapping[Name, Maker],
    folder: Path,
    bundle: Existing | None,
    min_agreement: float,
    progress: Progress,
    *,
    first: bool = False,
) -> Made:
    """Fill a folder with variants, proving each of them.

    Args:
        model: what is converted.
        wanted: makers of the variants.
        folder: an empty one.
        bundle: what the variants are for; None: a new one.
        min_agreement: see `qrank.converters.convert.convert`.
        progress: see `Progress`.
        first: `wanted` are alternatives: make the first that can be made.
    """
    checkpoint = model.checkpoint
    unfit = lacking(checkpoint, wanted, folder, together=not first)
    failed: Failed = {"-".join(name): error for name, error in unfit.items()}
    wanted = {name: maker for name, maker in wanted.items() if name not in unfit}
    unranked = [] if bundle is None else bundle.unranked
    if not wanted and not unranked:
        return Made([], None, failed)
    tokenizer = folder / TOKENIZER
    content = checkpoint.text_tokenizer()
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(text, "utf-8")
    old = None if bundle is None else bundle.manifest
    probes = None if old is None else old.probes
    ranking = None
    if model.verified:
        progress("running the fp32 reference")
        probes, ranking = _original(model, tokenizer, old)
    calibration = encode_pairs(model.pairs, tokenizer, checkpoint.family)
    variants = []
    with Worker() as worker:
        count = len(unranked) + (1 if first else len(wanted))
        for done, variant in enumerate(unranked):
            assert bundle is not None  # it has them
            assert probes is not None
            try:
                progress(Step(f"proving {variant.name}", done, count))
                _, rank = measure(bundle.folder, variant, probes, worker, ranking, min_agreement)
                variants.append(replace(variant, ranking=rank))
            except QrankError as error:
                failed[variant.name] = error
        for done, (name, maker) in enumerate(wanted.items(), len(unranked)):
            variant = Variant(*name, {}, Fidelity(0.0, 0.0, 0.0, 0.0), {})
            try:
                progress(Step(f"converting to {variant.name}", done, count))
                variant = _converted(variant, maker, checkpoint, calibration, folder)
                progress(Step(f"proving {variant.name}", done, count))
                against = probes or own_probes(checkpoint, tokenizer, folder, variant, worker)
                fidelity, rank = measure(folder, variant, against, worker, ranking, min_agreement)
                variants.append(replace(variant, fidelity=fidelity, ranking=rank))
                probes = against
                if first:
                    break
            # Library errors share no base; whatever it is, it affects only this variant.
            except Exception as error:
                needed = space(checkpoint, name, maker)
                failed[variant.name] = _failure(error, variant, folder, needed)
                shutil.rmtree(folder / variant.name, ignore_errors=True)
    return Made(variants, probes, failed, None if ranking is None else ranking.reference)


def _original(model: Model, tokenizer: Path, old: Manifest | None) -> tuple[Probes, Ranking | None]:
    """Run the original, unless the bundle has its logits; it is in memory only here."""
    original = Original(model.checkpoint)
    probes = make_probes(original, tokenizer) if old is None else old.probes
    past = None if old is None else old.ranking
    return probes, make_ranking(original, tokenizer, model.ranking, past)


def _converted(
    variant: Variant, maker: Maker, checkpoint: Checkpoint, calibration: Sequences, folder: Path
) -> Variant:
    """Make a variant's files.

    Raises:
        FidelityError: the converter wrote no file, or an empty one.
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
    """The error to report for a variant that was not made."""
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
