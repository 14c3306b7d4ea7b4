"""Measure every target of a bundle on this machine, each in a process of its own."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qrank.bundle.locate import DEFAULT, locate
from qrank.bundle.manifest import Manifest
from qrank.bundle.opened import Bundle
from qrank.errors import QrankError
from qrank.measure.discover import Found, Responder, start, surveys
from qrank.scoring import arguments
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.select import selection
from qrank.select.selection import PROFILES, Measurement, Profile
from qrank.select.targets import Target, expected
from qrank.system import machine

FIRST_LOOK_SECONDS = 0.5
"""Seconds that a first look at a target spends on a profile."""

SKIP_FACTOR = 3.0
"""So many times slower than the best so far, and a target gets no more than a glance."""

FINALIST_MARGIN = 0.35
"""Within this share of the fastest, a target is measured again, in turns with it."""

FINALISTS = 5

ROUNDS = (3, 7)
"""Least and most rounds in which finalists take turns."""

FINAL = 6.0
"""Seconds, for each profile, after which no further round begins."""

PATIENCE = 10.0
"""So many times longer than was to be expected, and a target is given up: it hangs."""

LEAST_PATIENCE = 10.0
"""Seconds that every answer may take."""

FIRST_PATIENCE = 30.0
"""Seconds that an answer may take where nothing is known yet, on the CPU."""

QUERY = "how do plants turn light into sugar?"

_WORDS = (
    "plants use the energy of light to make sugar from water and carbon dioxide which they take "
    "up by roots and leaves while a slow river carries sand past old towns whose people build "
    "boats bake bread and tell stories about winter storms that broke seven ships near the coast"
).split()

ProfileTexts = Mapping[Profile, list[str]]
"""Documents to time a target on, by profile; the query is QUERY."""

Key = TypeVar("Key")

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Candidate:
    """A target and how it runs: see `Measurement`."""

    target: Target
    compute_dtype: str | None
    threads: int
    batch: int | None = None

    @property
    def name(self) -> str:
        """`openvino-int8@cpu bf16`."""
        return f"{self.target.name} {self.compute_dtype or ''}".rstrip()

    def measured(self, **fields: Any) -> Measurement:
        """What was found out about it."""
        known = {"kendall": self.target.variant.fidelity.kendall, **fields}
        return Measurement(
            self.target.name,
            self.target.selector,
            self.target.device,
            compute_dtype=self.compute_dtype,
            threads=self.threads,
            batch=self.batch,
            bytes=self.target.variant.bytes,
            **known,
        )


def documents(bundle: Bundle, profile: Profile) -> list[str]:
    """Documents of a profile's number and length."""
    encoder = PairTokenizer(bundle.tokenizer, bundle.manifest.family)
    count, tokens = PROFILES[profile]
    lengths = [len(ids) for ids in encoder.ids([f" {word}" for word in _WORDS])]
    room = tokens - len(encoder.ids([QUERY])[0])
    made = []
    for place in range(count):
        words, left = [], room
        while left > 0:
            words.append(_WORDS[place % len(_WORDS)])
            left -= lengths[place % len(_WORDS)]
            place += 1
        made.append(" ".join(words))
    return made


def candidates(manifest: Manifest, found: Iterable[Found], threads: int) -> list[Candidate]:
    """Every variant on every device of every backend that reads it, in each arithmetic.

    The one expected to be the fastest comes first: what is much slower is then soon known.
    """
    made = [
        Candidate(Target(variant, device.name, backend.backend), compute_dtype, threads)
        for backend in found
        for variant in manifest.variants.values()
        if variant.format in backend.formats
        for device in backend.devices
        for compute_dtype in device.compute_dtypes
    ]
    return sorted(made, key=lambda c: (c.target.device == "cpu", *expected(c.target)))


def tune(
    model: str | Path | Bundle = DEFAULT,
    *,
    threads: int | None = None,
    limit: float | None = None,
    progress: Callable[[str], object] = log.info,
) -> list[Measurement]:
    """Measure every target of a bundle here, and remember it for `Reranker`.

    Each is opened in a process of its own, must reproduce the bundle's probes, and is timed on
    `selection.PROFILES`; then the fastest take turns, the best of them with other settings too.
    The time this takes is bounded: of a slow model, fewer documents are ranked.

    Args:
        model: as for `Reranker`.
        threads: CPU threads a target may use. None: all.
        limit: seconds a backend may take to open or to answer. None: ten times as long as others
            took, and some for large files.
        progress: told what is being measured.

    Returns:
        Every target in every setting, and the backends that cannot be used, with their reasons.

    Raises:
        QrankError: there is no such bundle.
    """
    model = arguments.model(model)
    threads = arguments.whole("threads", threads, 1) or machine.processors()
    limit = arguments.number("limit", limit, "seconds, more than 0", lambda x: x > 0)
    arguments.function("progress", progress)
    bundle = locate(model)
    manifest = bundle.manifest
    found = surveys(manifest, limit or 60.0, progress)
    contest = Tournament(
        bundle.folder, {profile: documents(bundle, profile) for profile in PROFILES}, limit
    )
    measured = [Measurement(f.backend, f.backend, "", f.reason) for f in found if f.reason]
    looks: list[Look] = []
    for candidate in candidates(manifest, found, threads):
        progress(f"trying {candidate.name}")
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
    selection.remember(manifest, threads, measured)
    return measured


def _as_of_now(
    old: Measurement, close: Sequence[Look], finals: Sequence[Measurement]
) -> Measurement:
    """A first look on the scale of the finals: by how much faster or slower finalists became.

    Whatever it was by then, it did not come near the fastest, and does not now.
    """
    speeds = dict(old.speeds)
    pairs = [(look.measurement, new) for look, new in zip(close, finals, strict=False)]
    for profile in PROFILES:
        changes = [b.speeds[profile] / a.speeds[profile] for a, b in pairs if b.reason is None]
        best = max((new.speeds[profile] for new in finals if new.reason is None), default=math.inf)
        if changes:
            scaled = speeds[profile] * float(np.median(changes))
            speeds[profile] = min(scaled, best * (1 - 2 * selection.TIE_MARGIN))
    return replace(old, speeds=speeds)


@dataclass(frozen=True)
class Look:
    """A candidate after a first look: what was measured, and the most memory it held, in bytes."""

    candidate: Candidate
    measurement: Measurement
    peak: int


def finalists(looks: Sequence[Look]) -> list[Look]:
    """Those near the fastest of a profile, the fastest on `passages` first.

    No more than FINALISTS, nor than find room in memory beside each other.
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


def room() -> float:
    """Bytes that targets may take beside each other.

    Where the system does not tell what is free, a part of what it has, or of a small machine's.
    """
    free = machine.free_memory()
    if free is not None:
        return free * 0.7
    return (machine.memory() or 4 * 2**30) * 0.4


def variations(best: Look, found: Iterable[Found], taken: int) -> list[Candidate]:
    """The best candidate with other threads and batches, where they may matter."""
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
                    made += [replace(candidate, batch=batch) for batch in device.batches[1:]]
    return made


@dataclass(frozen=True)
class Opened:
    """A candidate that runs in a process of its own.

    Attributes:
        candidate: it.
        child: the process.
        load: seconds it took to open.
        kendall: Kendall's tau against the original, in its arithmetic.
    """

    candidate: Candidate
    child: Responder
    load: float
    kendall: float


class Tournament:
    """Times candidates on the same documents.

    Args:
        folder: the bundle.
        work: the documents.
        limit: see `tune`.
        query: they are ranked for.
    """

    def __init__(
        self, folder: Path, work: ProfileTexts, limit: float | None = None, query: str = QUERY
    ) -> None:
        self._folder = folder.absolute()
        self._work = work
        self._limit = limit
        self._query = query
        self._slowest: dict[tuple[str, str], float] = {}

    @contextmanager
    def opened(self, candidate: Candidate) -> Iterator[Opened]:
        """A candidate, opened in a process of its own.

        Raises:
            QrankError: it cannot be used; with the reason.
        """
        child = start()
        question = {
            "do": "open",
            "model": str(self._folder),
            "backend": candidate.target.selector,
            "device": candidate.target.device,
            "compute_dtype": candidate.compute_dtype,
            "threads": candidate.threads,
            "batch": candidate.batch,
        }
        kind = ("open", candidate.target.device)
        try:
            begun = time.perf_counter()
            answer = child.ask(question, self.patience(candidate, self._slowest.get(kind)))
            self._learn(kind, time.perf_counter() - begun)
            yield Opened(candidate, child, answer["seconds"], answer["kendall"])
        except BaseException:
            child.close(kill=True)
            raise
        child.close()

    def patience(self, candidate: Candidate, expected: float | None) -> float:
        """Seconds to wait for a candidate's answer.

        Args:
            candidate: it.
            expected: seconds that it should take, by what is known of others; None: nothing is.
        """
        if self._limit is not None:
            return self._limit
        more = candidate.target.variant.bytes / 1e7
        if expected is not None:
            return max(PATIENCE * expected, LEAST_PATIENCE + more)
        return (FIRST_PATIENCE + more) * (1 if candidate.target.device == "cpu" else 10)

    def rank(self, opened: Opened, texts: list[str], expected: float | None = None) -> float:
        """Seconds it takes a candidate to rank texts; `expected` as `patience` has it."""
        question = {"do": "rank", "query": self._query, "documents": texts}
        limit = self.patience(opened.candidate, expected)
        seconds: float = opened.child.ask(question, limit)["seconds"]
        return seconds

    def peak(self, opened: Opened) -> int | None:
        """Most bytes a candidate's process held; None where the system does not tell."""
        limit = self.patience(opened.candidate, None)
        held: int | None = opened.child.ask({"do": "memory"}, limit)["bytes"]
        return held

    def _learn(self, kind: tuple[str, str], seconds: float) -> None:
        self._slowest[kind] = max(seconds, self._slowest.get(kind, 0.0))

    def look(self, candidate: Candidate, best: float) -> Look:
        """Open a candidate and time it for a moment.

        Args:
            candidate: what to look at.
            best: pairs a second on `passages` of the best so far.

        Raises:
            QrankError: it cannot be used; with the reason.
        """
        speeds: dict[str, float] = {}
        with self.opened(candidate) as opened:
            for profile, texts in self._work.items():
                few = texts[: max(candidate.threads, 2)]
                kind = (profile, candidate.target.device)
                # Twice: kernels are made for every new shape.
                first = self.rank(opened, few, self._slowest.get(kind))
                self._learn(kind, first)
                speed = len(few) / self.rank(opened, few, first)
                speeds[profile] = speed
                if speeds.get("passages", speed) * SKIP_FACTOR < best:
                    continue
                count = min(max(int(speed * FIRST_LOOK_SECONDS), len(few)), len(texts))
                rounds = min(max(int(speed * FIRST_LOOK_SECONDS / count), 1), 5)
                some = texts[:count]
                times = [self.rank(opened, some, count / speed) for _ in range(rounds)]
                speeds[profile] = float(count / np.median(times))
            peak = self.peak(opened) or 0
        found = candidate.measured(speeds=speeds, load=opened.load, kendall=opened.kendall)
        return Look(candidate, found, peak)

    def compare(
        self, chosen: Sequence[Candidate], progress: Callable[[str], object]
    ) -> list[Measurement]:
        """Time candidates in turns: what else the machine does meets all of them alike."""
        running: dict[int, Opened] = {}
        reasons: dict[int, str] = {}
        speeds: dict[int, dict[str, float]] = {number: {} for number in range(len(chosen))}

        def turns(
            texts: list[str],
            rounds: tuple[int, int],
            seconds: float,
            expected: Mapping[int, float],
        ) -> dict[int, list[float]]:
            cases = {
                number: partial(self.rank, opened, texts, expected.get(number))
                for number, opened in running.items()
                if number not in reasons
            }
            times, failed = in_turns(cases, rounds, seconds)
            reasons.update(failed)
            return times

        with ExitStack() as stack:
            for number, candidate in enumerate(chosen):
                try:
                    running[number] = stack.enter_context(self.opened(candidate))
                except QrankError as error:
                    reasons[number] = str(error)
            for profile, texts in self._work.items():
                progress(f"comparing the {len(running)} fastest: {profile}")
                few = texts[: max(chosen[0].threads, 2)]
                # Twice: kernels are made for every new shape.
                glances = {n: seconds for n, (_, seconds) in turns(few, (2, 2), 0, {}).items()}
                count = int(FIRST_LOOK_SECONDS * len(few) / max(glances.values(), default=1.0))
                some = texts[: max(count, len(few))]
                expected = {n: s * len(some) / len(few) for n, s in glances.items()}
                for number, times in turns(some, ROUNDS, FINAL, expected).items():
                    speeds[number][profile] = float(len(some) / np.median(times))
        return [
            candidate.measured(reason=reasons[number])
            if number in reasons
            else candidate.measured(
                speeds=speeds[number],
                load=running[number].load,
                kendall=running[number].kendall,
            )
            for number, candidate in enumerate(chosen)
        ]


def in_turns(
    cases: Mapping[Key, Callable[[], float]], rounds: tuple[int, int], seconds: float
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Call each case once a round; a round begins with another case each time.

    Args:
        cases: may raise a QrankError, and then has no further turn.
        rounds: least and most of them.
        seconds: after which no further round begins, once there are enough.

    Returns:
        What each case returned, round by round; and why the others failed.
    """
    found: dict[Key, list[float]] = {key: [] for key in cases}
    failed: dict[Key, str] = {}
    begun = time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - begun > seconds:
            break
        keys = list(found)
        first = number % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            try:
                found[key].append(cases[key]())
            except QrankError as error:
                failed[key] = str(error)
                del found[key]
    return found, failed
