"""A model -> a bundle, or one more variant of a bundle: whole or not at all."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from qrank import machine
from qrank.backends import FORMATS
from qrank.bundle import MANIFEST, TOKENIZER, FileRecord, Manifest, Variant
from qrank.converters.checkpoint import Checkpoint, read_checkpoint
from qrank.converters.fidelity import encode_pairs, make_probes, measure, own_probes
from qrank.converters.probes import calibration_pairs, read_pairs
from qrank.converters.ready_made import SUFFIXES, ReadyMade, find
from qrank.errors import ConversionError, FidelityError
from qrank.extras import DISTRIBUTION, EXTRA_OF, installed, need, pip_line
from qrank.fidelity import TOLERANCES, Fidelity
from qrank.work import Work

Progress = Callable[[str], None]
"""Called with what is being done, each time that changes."""

Name = tuple[str, str]
"""A variant's format and precision."""

log = logging.getLogger("qrank")


class Maker(Protocol):
    """Fills a variant's folder: a converter, or what takes over a ready-made file."""

    @property
    def MODULES(self) -> Sequence[str]:  # noqa: N802 (a converter's constant)
        """What making and running the variant takes."""

    @property
    def MEMORY(self) -> float:  # noqa: N802
        """The least memory it takes, in times of the model's size in fp32."""

    def convert(
        self, checkpoint: Checkpoint, precision: str, folder: Path, calibration: Work
    ) -> str:
        """Write the variant's files; gives a note for the manifest, "" mostly."""


def converter(format: str) -> ModuleType:
    """The converter module of a format."""
    return importlib.import_module(f"qrank.converters.{format}")


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


def convert(
    source: str,
    variants: Sequence[tuple[str, str | None]] | None = None,
    output: Path | None = None,
    *,
    reference: str | None = None,
    family: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    force: bool = False,
    calibration: Path | None = None,
    progress: Progress = lambda step: None,
) -> tuple[Path, Manifest]:
    """Convert a checkpoint, or take over ready-made files, and prove every variant.

    Args:
        source: a checkpoint's folder or hub id; or those of ready-made files, or one such file.
        variants: (format, precision) pairs to make, a precision of None being the default; those
            the bundle has already are kept. None: every format whose packages are installed, or
            of which there is a ready-made file.
        output: the bundle's folder; None: `NAME-qrank` in the working directory. A bundle of the
            same checkpoint gains the variants.
        reference: the checkpoint that ready-made files were made of, to prove them against: the
            bundle is then the checkpoint's. None: they are held against themselves.
        family: a card's name or file; None to match by config.json.
        revision: of the hub's repository.
        offline: do not ask the hub.
        force: replace what is at `output`, whatever bundle it is.
        calibration: JSON lines with "query" and "document", whose activations quantization looks
            at beside those of the pairs that come with qrank; None: at those alone.
        progress: told each step.

    Returns:
        The bundle's folder and its manifest.

    Raises:
        QrankError: see `qrank.errors`. What was at `output` is then as it was.
    """
    progress("reading the model")
    ready = find(source, variants, revision=revision, offline=offline)
    if ready is None:
        if reference is not None:
            raise ConversionError(
                f"--reference is what ready-made files are proven against; {source} is none of "
                f"them: {', '.join(f'*{suffix}' for suffix in SUFFIXES.values())}"
            )
        makers = _converters(variants)
    else:
        if calibration is not None:
            raise ConversionError(f"--calibration is for quantizing; {source} is ready-made")
        makers = _takers(ready, variants)
    # Never the user's alone: activations are wrong beyond what was seen, and theirs may be all
    # alike, none of them empty or long.
    pairs = calibration_pairs() + ([] if calibration is None else read_pairs(calibration))
    if ready is None:
        checkpoint = read_checkpoint(source, family=family, revision=revision, offline=offline)
    elif reference is None:
        checkpoint = ready.describe(family)
    else:
        checkpoint = read_checkpoint(reference, family=family, offline=offline)
    target = (output or Path(f"{checkpoint.name}-qrank")).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    old = None if force else _existing(target, checkpoint)
    wanted = {
        name: maker
        for name, maker in makers.items()
        if old is None or "-".join(name) not in old.variants
    }
    if old is not None and not wanted:
        return target, old
    _check_memory(checkpoint, wanted)
    work = target.with_name(f".{target.name}.partial-{os.getpid()}")
    work.mkdir()
    try:
        verified = ready is None or reference is not None
        manifest = _build(checkpoint, wanted, pairs, work, old, verified, progress)
        if old is None:
            _replace(work, target)
        else:
            _add(work, target, manifest, wanted)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target, manifest


def _converters(variants: Sequence[tuple[str, str | None]] | None) -> dict[Name, Maker]:
    """What makes each variant of a checkpoint."""
    if variants is None:
        # With none at hand, the first says what is missing.
        formats = formats_at_hand() or FORMATS
        for absent in sorted(set(FORMATS) - set(formats)):
            log.warning("leaving out %s: %s", absent, pip_line(extras_for(absent)))
        variants = [(format, None) for format in formats]
    makers: dict[Name, Maker] = {}
    for format, named in variants:
        module, precision = converter(format), named or default_precision(format)
        if precision not in module.PRECISIONS:
            raise ConversionError(
                f"{format} has no {precision}; it has: {', '.join(module.PRECISIONS)}"
            )
        _require(module)
        makers[format, precision] = cast(Maker, module)
    return makers


def _takers(
    ready: ReadyMade, variants: Sequence[tuple[str, str | None]] | None
) -> dict[Name, Maker]:
    """What makes each variant of ready-made files, the most exact one first."""
    makers: dict[Name, Maker] = {}
    asked = dict(variants or ())
    for taker in ready.takers:
        _require(taker)
        precision = taker.precision
        if (wanted := asked.get(taker.format)) not in (None, precision):
            raise ConversionError(f"{taker.path.name} is {precision}, and not {wanted}")
        makers[taker.format, precision] = taker
    return dict(sorted(makers.items(), key=lambda item: TOLERANCES[item[0][1]].share))


def _require(maker: Maker) -> None:
    for name in maker.MODULES:
        if not installed(name):
            need(name)


def _check_memory(checkpoint: Checkpoint, wanted: Mapping[Name, Maker]) -> None:
    """Refuse, before any work, what this machine's memory cannot suffice for.

    Raises:
        ConversionError: with how much it takes, how much there is, and what takes less.
    """
    there = machine.memory()
    most = max(maker.MEMORY for maker in wanted.values())
    if there is None or not most:
        return
    whole = 4 * checkpoint.parameters()
    for (format, precision), maker in wanted.items():
        if (takes := whole * maker.MEMORY) > there:
            least = {name: whole * converter(name).MEMORY for name in FORMATS}
            fitting = [f"{name} ({n / 1e9:,.1f} GB)" for name, n in least.items() if n <= there]
            raise ConversionError(
                f"converting {checkpoint.name} to {format}-{precision} takes {takes / 1e9:,.1f} GB "
                f"of memory or more, and this machine has {there / 1e9:,.1f} GB: take "
                + (f"--to {' or '.join(fitting)}, or " if fitting else "")
                + "a larger machine; the bundle runs here where its files fit"
            )


def _build(
    checkpoint: Checkpoint,
    wanted: Mapping[Name, Maker],
    pairs: list[tuple[str, str]],
    folder: Path,
    old: Manifest | None,
    verified: bool,
    progress: Progress,
) -> Manifest:
    """Fill a folder with a bundle of the wanted variants, all proven."""
    tokenizer = folder / TOKENIZER
    content = checkpoint.text_tokenizer()
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(text, "utf-8")
    probes = None if old is None else old.probes
    if probes is None and verified:
        progress("running the fp32 reference")
        probes = make_probes(checkpoint, tokenizer)
    calibration = encode_pairs(pairs, tokenizer, checkpoint.family)
    variants = []
    for (format, precision), maker in wanted.items():
        blank = Fidelity(0.0, 0.0, 0.0, 0.0)
        variant = Variant(format, precision, {}, blank, _versions(maker))
        progress(f"converting to {variant.name}")
        part = folder / variant.name
        part.mkdir()
        note = maker.convert(checkpoint, precision, part, calibration)
        progress(f"proving {variant.name}")
        files = {
            path.relative_to(folder).as_posix(): FileRecord.of(path)
            for path in sorted(part.rglob("*"))
            if path.is_file()
        }
        if not files or min(record.bytes for record in files.values()) == 0:
            raise FidelityError(f"the converter of {variant.name} wrote an empty file")
        if probes is None:
            probes = own_probes(checkpoint, tokenizer, folder, variant)
        fidelity = measure(folder, variant, probes)
        variants.append(replace(variant, files=files, fidelity=fidelity, note=note))
    assert probes is not None  # something was wanted
    manifest = old or Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        source=checkpoint.source,
        files={TOKENIZER: FileRecord.of(tokenizer)},
        probes=probes,
    )
    # Bundles of before did not say.
    manifest = replace(manifest, dimensions=checkpoint.dimensions)
    for variant in variants:
        manifest = manifest.with_variant(variant)
    manifest.save(folder)
    return manifest


def _versions(maker: Maker) -> dict[str, str]:
    packages = (DISTRIBUTION.get(name, name) for name in ("qrank", *maker.MODULES))
    return {name: metadata.version(name) for name in packages}


def _existing(target: Path, checkpoint: Checkpoint) -> Manifest | None:
    """The bundle that gains variants; None where nothing is.

    Raises:
        ConversionError: something else is there.
    """
    if not target.exists():
        return None
    if not (target / MANIFEST).is_file():
        if target.is_dir() and not any(target.iterdir()):
            return None
        raise ConversionError(
            f"{target} exists and is no bundle; name another folder with -o, or --force "
            "to replace it"
        )
    old = Manifest.load(target)
    if old.source.fingerprint != checkpoint.source.fingerprint or old.family != checkpoint.family:
        raise ConversionError(
            f"{target} was converted from {old.source.id} (family {old.family.name}), and "
            f"{checkpoint.source.id} is another checkpoint; name another folder with -o, "
            "or --force to replace it"
        )
    return old


def _replace(work: Path, target: Path) -> None:
    """Put a finished bundle in place; what was there goes only when it is."""
    if not target.exists():
        work.rename(target)
        return
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(aside)
    try:
        work.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _add(work: Path, target: Path, manifest: Manifest, wanted: Iterable[Name]) -> None:
    """Move new variants into a bundle. The manifest, replaced last, is what makes them count."""
    for format, precision in wanted:
        part = target / f"{format}-{precision}"
        if part.exists():
            # Not in the manifest: moved here by a run that was killed before it came to that.
            shutil.rmtree(part)
        (work / part.name).rename(part)
    manifest.save(target)


def _clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside the target, and put back what one had set aside."""
    for path in target.parent.glob(f".{target.name}.*-*"):
        kind, _, process = path.name.removeprefix(f".{target.name}.").partition("-")
        if kind not in ("partial", "old") or not process.isdigit() or _alive(int(process)):
            continue
        if kind == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    if os.name != "posix":
        # There, signal 0 is Ctrl-C: leave the folder to its owner.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
