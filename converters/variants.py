"""Make and prove variants independently: a failure does not affect the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qrank.backends.isolation import Worker
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import TOKENIZER, FileRecord, Manifest, Probes, Variant
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.ids import encode_pairs
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.fidelity import make_probes, measure, own_probes
from qrank.converters.makers import Failed, Maker, Name
from qrank.converters.resources import lacking, space, versions
from qrank.converters.sources import Model
from qrank.errors import ConversionError, FidelityError, MissingExtraError, QrankError
from qrank.system import disk

Progress = Callable[[str], object]
"""Called with the current step whenever it changes."""


@dataclass(frozen=True)
class Made:
    """Variants that were made and proven, the probes they are proven against, and failures."""

    variants: list[Variant]
    probes: Probes | None
    failed: Failed


def make(
    model: Model,
    wanted: Mapping[Name, Maker],
    folder: Path,
    old: Manifest | None,
    progress: Progress,
    *,
    first: bool = False,
) -> Made:
    """Fill a folder with variants, proving each of them; with `first`, with one of them."""
    checkpoint = model.checkpoint
    unfit = lacking(checkpoint, wanted, folder, together=not first)
    failed: Failed = {"-".join(name): error for name, error in unfit.items()}
    wanted = {name: maker for name, maker in wanted.items() if name not in unfit}
    if not wanted:
        return Made([], None, failed)
    tokenizer = folder / TOKENIZER
    content = checkpoint.text_tokenizer()
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(text, "utf-8")
    probes = None if old is None else old.probes
    if probes is None and model.verified:
        progress("running the fp32 reference")
        probes = make_probes(checkpoint, tokenizer)
    calibration = encode_pairs(model.pairs, tokenizer, checkpoint.family)
    variants = []
    with Worker() as worker:
        for name, maker in wanted.items():
            variant = Variant(*name, {}, Fidelity(0.0, 0.0, 0.0, 0.0), {})
            try:
                progress(f"converting to {variant.name}")
                variant = _converted(variant, maker, checkpoint, calibration, folder)
                progress(f"proving {variant.name}")
                against = probes or own_probes(checkpoint, tokenizer, folder, variant, worker)
                fidelity = measure(folder, variant, against, worker)
                variants.append(replace(variant, fidelity=fidelity))
                probes = against
                if first:
                    break
            # Library errors share no base; whatever it is, it affects only this variant.
            except Exception as error:
                needed = space(checkpoint, name, maker)
                failed[variant.name] = _failure(error, variant, folder, needed)
                shutil.rmtree(folder / variant.name, ignore_errors=True)
    return Made(variants, probes, failed)


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
