"""Measure every target of a bundle on this machine, each in its own process."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qrank.bundle.locate import DEFAULT
from qrank.bundle.opened import Bundle
from qrank.errors import QrankError
from qrank.measure.candidates import Candidate, candidates
from qrank.measure.discover import Found, surveys
from qrank.measure.profiles import documents
from qrank.measure.tournament import Look, Tournament, room
from qrank.scoring import arguments
from qrank.select import measurements
from qrank.select.measurements import PROFILES, Measurement
from qrank.select.obtain import obtain
from qrank.select.selection import TIE_MARGIN
from qrank.select.targets import TargetKey
from qrank.system import machine
from qrank.system.steps import Step

FINALIST_MARGIN = 0.35
"""Targets within this share of the fastest speed are measured again, in turns with the fastest."""

FINALISTS = 5

log = logging.getLogger("qrank")


def tune(
    model: str | Path | Bundle = DEFAULT,
    *,
    revision: str | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    progress: Callable[[str], object] = log.info,
) -> list[Measurement]:
    """Measure every target of a bundle here, and store the results for `Reranker`.

    Each target is opened in its own process, must reproduce the bundle's probes, and is timed on
    `PROFILES`. Then the fastest are timed in turns, the best of them with other settings too.
    The total time is bounded: slow models rank fewer documents.

    Args:
        model: as for `Reranker`; a checkpoint is converted to one variant.
        revision: as for `Reranker`.
        threads: CPU threads a target may use. None: all.
        timeout: seconds a backend may take to open or to answer. None: ten times as long as
            expected from earlier answers, with more time for large files.
        progress: called with what is being measured.

    Returns:
        Every target in every setting, and the backends that cannot be used, with their reasons.

    Raises:
        QrankError: there is no such bundle.
    """
    model = arguments.model(model)
    revision = arguments.text("revision", revision)
    threads = arguments.threads(threads)
    timeout = arguments.number("timeout", timeout, "seconds, more than 0", lambda x: x > 0)
    arguments.function("progress", progress)
    bundle = obtain(model, revision=revision, progress=progress)
    manifest = bundle.manifest
    found = surveys(manifest, timeout or 60.0, progress)
    contest = Tournament(
        bundle.folder, {profile: documents(bundle, profile) for profile in PROFILES}, timeout
    )
    measured = [Measurement(TargetKey("", "", f.backend), f.reason) for f in found if f.reason]
    looks: list[Look] = []
    tried = list(candidates(manifest, found, threads))
    for done, candidate in enumerate(tried):
        progress(Step(f"trying {candidate.name}", done, len(tried)))
        best = max((look.measurement.speeds["passages"] for look in looks), default=0.0)
        try:
            looks.append(contest.look(candidate, best))
        except QrankError as error:
            measured.append(candidate.measured(reason=str(error)))
    close = finalists(looks)
    rest = [look.measurement for look in looks if look not in close]
    chosen = [look.candidate for look in close]
    if close:
        chosen += variations(close[0], found, len(close))
    finals = contest.compare(chosen, progress) if len(chosen) > 1 else []
    if finals:
        rest = [_as_of_now(m, close, finals) for m in rest]
    else:
        finals = [look.measurement for look in close]
    measured += finals + rest
    measurements.remember(manifest, threads, measured)
    return measured


def _as_of_now(
    old: Measurement, close: Sequence[Look], finals: Sequence[Measurement]
) -> Measurement:
    """Rescale a first look to the finals, by the median change in the finalists' speeds.

    The target was not near the fastest in the first look, so its speed is capped below the best.
    """
    speeds = dict(old.speeds)
    pairs = [(look.measurement, new) for look, new in zip(close, finals, strict=False)]
    for profile in PROFILES:
        changes = [b.speeds[profile] / a.speeds[profile] for a, b in pairs if b.reason is None]
        best = max((new.speeds[profile] for new in finals if new.reason is None), default=math.inf)
        if changes:
            scaled = speeds[profile] * float(np.median(changes))
            speeds[profile] = min(scaled, best * (1 - 2 * TIE_MARGIN))
    return replace(old, speeds=speeds)


def finalists(looks: Sequence[Look]) -> list[Look]:
    """Targets near the fastest of any profile, the fastest on `passages` first.

    At most FINALISTS, and no more than fit in memory together.
    """
    ranked: list[Look] = []
    for profile in sorted(PROFILES, key=lambda name: name != "passages"):
        by_speed = sorted(looks, key=lambda look: -look.measurement.speeds[profile])
        for look in by_speed:
            near = (1 - FINALIST_MARGIN) * by_speed[0].measurement.speeds[profile]
            if look not in ranked and look.measurement.speeds[profile] >= near:
                ranked.append(look)
    left = room()
    kept: list[Look] = []
    for look in ranked[:FINALISTS]:
        left -= look.peak
        if left >= 0 or not kept:
            kept.append(look)
    return kept


def variations(best: Look, found: Iterable[Found], taken: int) -> list[Candidate]:
    """The best candidate with other threads and batch sizes, if memory allows."""
    if best.peak * (taken + 2) > room():
        return []
    candidate = best.candidate
    made = []
    if candidate.target.device == "cpu" and machine.cores() < candidate.threads:
        made.append(replace(candidate, threads=machine.cores()))
    for backend in found:
        if backend.backend == candidate.target.backend:
            for device in backend.devices:
                if device.name == candidate.target.device:
                    made += [
                        replace(candidate, max_batch_tokens=tokens) for tokens in device.batches[1:]
                    ]
    return made
