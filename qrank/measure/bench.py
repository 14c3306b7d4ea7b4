"""Time all targets of a bundle in turns, for `qrank bench`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from qrank.bundle.locate import DEFAULT
from qrank.bundle.opened import Bundle
from qrank.errors import InputError, QrankError
from qrank.measure.candidates import candidates
from qrank.measure.discover import surveys
from qrank.measure.profiles import QUERY, documents
from qrank.measure.tournament import Opened, Tournament, in_turns, room
from qrank.scoring import arguments
from qrank.scoring.inputs import as_texts
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.select.measurements import Profile
from qrank.select.obtain import Wanted, obtain
from qrank.select.selection import Criteria, order
from qrank.select.targets import TargetKey, named
from qrank.system import machine
from qrank.system.steps import Step

COUNTS = (1, 20, 100)
"""Documents per request."""

ROUNDS = (5, 30)
"""Minimum and maximum number of rounds."""

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Row:
    """Results of a target, or why it cannot be used.

    Attributes:
        target: the target; or a backend, if none of its targets can be used.
        setting: compute dtype; "" if there is no choice.
        reason: why it cannot be used; None if it can.
        pairs: pairs per second, with the largest request.
        tokens: tokens per second, with the largest request.
        p50: median milliseconds of a request, by its number of documents.
        p95: 95th percentile of the milliseconds, by number of documents.
        load: seconds to open it.
        peak: peak memory of its process in bytes, with Python and the tokenizer; None if the
            system does not report it.
        bytes: size of its files.
        kendall: Kendall's tau against the original, on the bundle's probes.
        agreement: of its variant's rankings with the original's at conversion (nDCG@10); None if
            they were not compared.
        rounds: timed requests, by number of documents.
    """

    target: TargetKey
    setting: str
    reason: str | None = None
    pairs: float = 0.0
    tokens: float = 0.0
    p50: dict[int, float] = field(default_factory=dict)
    p95: dict[int, float] = field(default_factory=dict)
    load: float = 0.0
    peak: int | None = None
    bytes: int = 0
    kendall: float = -1.0
    agreement: float | None = None
    rounds: dict[int, int] = field(default_factory=dict)

    def speed(self, profile: Profile) -> float:
        """Pairs per second on the ranked documents: the same for every profile."""
        return self.pairs


def bench(
    model: str | Path | Bundle = DEFAULT,
    *,
    texts: Sequence[str] | None = None,
    query: str | None = None,
    threads: int | None = None,
    backends: Sequence[str] = (),
    device: str | None = None,
    seconds: float = 30.0,
    progress: Callable[[str], object] = log.info,
) -> list[Row]:
    """Rank the same documents with every target; targets take turns, one request each.

    Args:
        model: as for `Reranker`.
        texts: documents; repeated if there are fewer than a request needs. None: made-up ones of
            128 tokens, query included.
        query: the query. None: a made-up one.
        threads: CPU threads a target may use. None: all.
        backends: formats, variants and other names of `qrank.select.targets.named`; () for all.
            All targets they select are in memory at once.
        device: the device. None: every device that is present.
        seconds: time for each request size, after which no further round begins.
        progress: called with what is being done.

    Returns:
        Rows, the fastest first, then those that cannot be used.

    Raises:
        QrankError: there is no such bundle, or it has no such target.
    """
    model = arguments.model(model)
    threads = arguments.threads(threads)
    arguments.number("seconds", seconds, "a number, 0 or more", lambda x: x >= 0, none=False)
    arguments.function("progress", progress)
    query = arguments.text("query", query) or QUERY
    given = None if texts is None else as_texts(texts, "texts", "text")
    backends = as_texts(backends, "backends", "name")
    device = arguments.device(device)
    bundle = obtain(model, Wanted(backends, device), progress=progress)
    manifest = bundle.manifest
    given = documents(bundle, "passages") if given is None else given
    if not given:
        raise InputError("no documents: give at least one")
    work = [given[place % len(given)] for place in range(COUNTS[-1])]
    wanted = [run for backend in backends for run in named(manifest, backend)]
    rows: list[Row] = []
    found = surveys(manifest, 60.0, progress)
    rows += [Row(TargetKey("", "", f.backend), "", f.reason) for f in found if f.reason]
    chosen = [
        c
        for c in candidates(manifest, found, threads)
        if (not backends or (c.target.variant, c.target.backend) in wanted)
        and device in (None, c.target.device)
    ]
    if not chosen:
        asked = ", ".join([*backends, *([device] if device else [])])
        raise InputError(f"there is no target here that is {asked or 'of a known format'}")
    encoder = PairTokenizer(bundle.tokenizer, manifest.family, threads=threads)
    tokens = sum(len(encoder.whole(query, text)[0]) for text in work)
    contest = Tournament(bundle.folder, {}, query=query)
    with ExitStack() as stack:
        running: list[Opened] = []
        failed: dict[int, str] = {}
        for done, candidate in enumerate(chosen):
            progress(Step(f"opening {candidate.name}", done, len(chosen)))
            # If the system reports free memory, that already excludes the open targets.
            taken = 0 if machine.free_memory() is not None else _taken(running)
            if candidate.target.variant.bytes * 3 + taken > room():
                reason = "no room in memory beside the others: name fewer with --backend"
                rows.append(Row(candidate.target.key, candidate.compute_dtype or "", reason))
                continue
            try:
                running.append(stack.enter_context(contest.opened(candidate)))
            except QrankError as error:
                rows.append(Row(candidate.target.key, candidate.compute_dtype or "", str(error)))
        times: dict[int, dict[int, list[float]]] = {}
        expected: dict[int, float] = {}
        for done, count in enumerate(COUNTS):
            progress(Step(f"ranking {count} in turns", done, len(COUNTS)))
            cases = {
                number: partial(contest.rank, opened, work[:count], expected.get(number))
                for number, opened in enumerate(running)
                if number not in failed
            }
            failed |= in_turns(cases, (1, 1), 0)[1]  # warms up
            cases = {number: case for number, case in cases.items() if number not in failed}
            times[count], more = in_turns(cases, ROUNDS, seconds)
            failed |= more
            # The next documents may be many times longer than those before.
            expected = {n: max(seconds) * COUNTS[-1] for n, seconds in times[count].items()}
        for number, opened in enumerate(running):
            candidate = opened.candidate
            target, setting = candidate.target, candidate.compute_dtype or ""
            if number in failed:
                rows.append(Row(target.key, setting, failed[number]))
                continue
            ms = {count: np.array(times[count][number]) * 1000 for count in COUNTS}
            calls = 1000 / float(np.mean(ms[COUNTS[-1]]))
            rows.append(
                Row(
                    target=target.key,
                    setting=setting,
                    pairs=COUNTS[-1] * calls,
                    tokens=tokens * calls,
                    p50={count: float(np.percentile(ms[count], 50)) for count in COUNTS},
                    p95={count: float(np.percentile(ms[count], 95)) for count in COUNTS},
                    load=opened.load,
                    peak=contest.peak(opened),
                    bytes=target.variant.bytes,
                    kendall=opened.kendall,
                    agreement=ranking.ndcg if (ranking := target.variant.ranking) else None,
                    rounds={count: len(ms[count]) for count in COUNTS},
                )
            )
    return sorted(rows, key=lambda row: (row.reason is not None, -row.pairs))


def chosen(rows: Sequence[Row], criteria: Criteria, last: Collection[str] = ()) -> Row | None:
    """The row of the target that the criteria choose; None if there is none.

    Args:
        rows: from `bench`.
        criteria: what decides.
        last: names of variants to take after all others, from `selection.deprioritized`.
    """
    return next(iter(order(rows, criteria, last)), None)


def _taken(running: Sequence[Opened]) -> int:
    """Estimated bytes of memory that targets take."""
    return sum(opened.candidate.target.variant.bytes * 3 for opened in running)
