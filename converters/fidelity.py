"""Run the fp32 reference and compare every variant with it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np

from qrank.backends import Options, isolation, spec, tolerance
from qrank.bundle.agreement import LEAST, Agreement
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import Probes, Variant
from qrank.bundle.sequences import Logits, Sequences
from qrank.converters.checkpoint.ids import check_ids, encode_pairs
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.checkpoint.reference import Original
from qrank.converters.ranking import Ranking
from qrank.errors import ConversionError, FidelityError, TargetError
from qrank.system.extras import need
from qrank.system.machine import processors
from qrank.system.subprocess_rpc import NoChildError

log = logging.getLogger("qrank")


def make_probes(original: Original, tokenizer: Path) -> Probes:
    """The probe pairs with the reference's logits."""
    checkpoint = original.checkpoint
    pairs = probe_pairs(checkpoint.words)
    work = encode_pairs(pairs, tokenizer, checkpoint.family)
    check_ids(pairs, work, checkpoint)
    torch, transformers = need("torch"), need("transformers")
    kind = checkpoint.read_as or checkpoint.family.architecture
    return Probes(
        work,
        original.logits(work),
        f"{kind}, fp32, transformers {transformers.__version__}, torch {torch.__version__}",
    )


def own_probes(
    checkpoint: Checkpoint,
    tokenizer: Path,
    folder: Path,
    variant: Variant,
    worker: isolation.Worker,
) -> Probes:
    """The probe pairs with a prebuilt model's own logits, in its most exact arithmetic.

    Each pair is a batch of one.

    Raises:
        ConversionError: the model does not load or run, or its logits do not tell pairs apart.
    """
    pairs = probe_pairs(checkpoint.words)
    work = encode_pairs(pairs, tokenizer, checkpoint.family)
    check_ids(pairs, work, checkpoint)
    singles = [work.take(np.array([i])) for i in range(len(work))]
    logits = np.concatenate(_run(folder, variant, singles, worker))
    if not np.isfinite(logits).all() or not np.ptp(logits):
        raise ConversionError(
            f"the prebuilt {variant.name} does not tell pairs apart: its logits run from "
            f"{logits.min():.4g} to {logits.max():.4g}. It lacks its score head, or is another "
            "family's (--family)"
        )
    runtime = spec(variant.format).version()
    return Probes(work, logits, f"the prebuilt {variant.name} itself, {runtime}", verified=False)


def measure(
    folder: Path,
    variant: Variant,
    probes: Probes,
    worker: isolation.Worker,
    ranking: Ranking | None = None,
    least: float = LEAST,
) -> tuple[Fidelity, Agreement | None]:
    """Measure a variant on the probes, and on rankings, with the backend that will run it.

    Args:
        folder: the bundle's folder.
        variant: a variant of the bundle.
        probes: the reference to compare with.
        worker: the process for native libraries that may crash.
        ranking: the original's rankings; None: there are none.
        least: agreement of the rankings that is required.

    Raises:
        FidelityError: the variant misses the tolerance of its precision, or does not rank like the
            original.
        ConversionError: the variant does not load or run.
    """
    works = [] if ranking is None else ranking.works
    logits, *ranked = _run(folder, variant, [probes.work, *works], worker)
    fidelity = Fidelity.of(logits, probes.logits)
    bar = tolerance(variant.format, variant.precision)
    if missed := bar.shortfall(fidelity):
        like = "the original" if probes.verified else probes.reference
        raise FidelityError(
            f"{variant.name} does not rank like {like}: {missed} "
            f"(spread of the reference {fidelity.spread:.4g})"
        )
    return fidelity, None if ranking is None else _agreement(variant, ranked, ranking, least)


def _agreement(variant: Variant, logits: list[Logits], ranking: Ranking, least: float) -> Agreement:
    """Compare rankings.

    Raises:
        FidelityError: they do not agree.
    """
    reference = ranking.reference
    try:
        found = Agreement.of(logits, reference.logits, reference.data)
    except ValueError as error:
        raise FidelityError(f"{variant.name} does not rank: {error}") from error
    if missed := found.shortfall(least):
        raise FidelityError(
            f"{variant.name} does not rank like the original: {missed}. Convert to another "
            "precision, prove it on your own queries (--ranking-data), or accept it "
            f"(--min-agreement {math.floor(found.ndcg * 1000) / 1000:g})"
        )
    return found


def _run(
    folder: Path, variant: Variant, works: list[Sequences], worker: isolation.Worker
) -> list[Logits]:
    """Logits of each work from a variant's backend, in its most exact arithmetic.

    Runs in a separate process if a native library could crash this one.
    """
    options = Options(processors())
    try:
        if isolation.advised(variant.format, "cpu"):
            try:
                return worker.logits(folder, variant, works, options)
            except NoChildError as error:
                log.warning("%s: so %s is tried in this one", error, variant.name)
        backend = spec(variant.format).open(folder, variant, "cpu", options)
        try:
            return [backend.logits(work) for work in works]
        finally:
            backend.close()
    except TargetError as error:
        raise ConversionError(f"{variant.name} was made but does not run: {error}") from error
