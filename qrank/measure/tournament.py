"""Time targets on the same documents, each in its own process; the fastest ones in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from qrank.bundle.fidelity import Fidelity
from qrank.errors import QrankError
from qrank.measure.candidates import Candidate
from qrank.measure.discover import Responder, start
from qrank.measure.profiles import QUERY
from qrank.select.measurements import Measurement, Profile
from qrank.system import machine
from qrank.system.steps import Step

FIRST_LOOK_SECONDS = 0.5
"""Seconds that a first look at a target spends on a profile."""

SKIP_FACTOR = 3.0
"""A target that is this many times slower than the best so far gets only a glance."""

ROUNDS = (3, 7)
"""Minimum and maximum number of rounds in which finalists take turns."""

FINAL = 6.0
"""Seconds, for each profile, after which no further round begins."""

PATIENCE = 10.0
"""A target that takes this many times longer than expected counts as hanging."""

LEAST_PATIENCE = 10.0
"""Seconds that any answer may take, plus time for large files."""

FIRST_PATIENCE = 30.0
"""Seconds that an answer may take on the CPU if nothing is known yet, plus time for large files;
other devices get ten times as long."""

ProfileTexts = Mapping[Profile, list[str]]
"""Documents to time a target on, by profile."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Look:
    """A candidate after a first look: its measurement, and its peak memory in bytes."""

    candidate: Candidate
    measurement: Measurement
    peak: int


def room() -> float:
    """Bytes of memory that targets may take together.

    If the system does not report free memory: a share of all memory, or of 4 GiB if that is unknown
    too.
    """
    free = machine.free_memory()
    if free is not None:
        return free * 0.7
    return (machine.memory() or 4 * 2**30) * 0.4


@dataclass(frozen=True)
class Opened:
    """A candidate that runs in its own process.

    Attributes:
        candidate: the candidate.
        child: the process.
        load: seconds it took to open.
        kendall: Kendall's tau against the original, in its compute dtype.
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
        timeout: see `tune`.
        query: the query that documents are ranked for.
    """

    def __init__(
        self, folder: Path, work: ProfileTexts, timeout: float | None = None, query: str = QUERY
    ) -> None:
        self._folder = folder.absolute()
        self._work = work
        self._timeout = timeout
        self._query = query
        self._slowest: dict[tuple[str, str], float] = {}

    @contextmanager
    def opened(self, candidate: Candidate) -> Iterator[Opened]:
        """Open a candidate in its own process.

        Raises:
            QrankError: it cannot be used; the message says why.
        """
        child = start()
        question = {
            "do": "open",
            "model": str(self._folder),
            "backend": candidate.target.key.selector,
            "device": candidate.target.device,
            "compute_dtype": candidate.compute_dtype,
            "threads": candidate.threads,
            "max_batch_tokens": candidate.max_batch_tokens,
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
            candidate: the candidate.
            expected: seconds that the answer should take, judging by others; None: unknown.
        """
        if self._timeout is not None:
            return self._timeout
        more = candidate.target.variant.bytes / 1e7
        if expected is not None:
            return max(PATIENCE * expected, LEAST_PATIENCE + more)
        return (FIRST_PATIENCE + more) * (1 if candidate.target.device == "cpu" else 10)

    def rank(self, opened: Opened, texts: list[str], expected: float | None = None) -> float:
        """Seconds a candidate takes to rank texts; `expected` as for `patience`."""
        question = {"do": "rank", "query": self._query, "documents": texts}
        limit = self.patience(opened.candidate, expected)
        seconds: float = opened.child.ask(question, limit)["seconds"]
        return seconds

    def fidelity(self, opened: Opened) -> Fidelity:
        """How close a candidate is to the original, on all of the bundle's probes."""
        limit = self.patience(opened.candidate, None)
        return Fidelity(**opened.child.ask({"do": "fidelity"}, limit))

    def peak(self, opened: Opened) -> int | None:
        """Peak memory of a candidate's process in bytes; None if the system does not report it."""
        limit = self.patience(opened.candidate, None)
        held: int | None = opened.child.ask({"do": "memory"}, limit)["bytes"]
        return held

    def _learn(self, kind: tuple[str, str], seconds: float) -> None:
        self._slowest[kind] = max(seconds, self._slowest.get(kind, 0.0))

    def look(self, candidate: Candidate, best: float) -> Look:
        """Open a candidate and time it for a moment.

        Args:
            candidate: what to look at.
            best: pairs per second on `passages` of the best so far.

        Raises:
            QrankError: it cannot be used; the message says why.
        """
        speeds: dict[str, float] = {}
        with self.opened(candidate) as opened:
            for profile, texts in self._work.items():
                few = texts[: max(candidate.threads, 2)]
                kind = (profile, candidate.target.device)
                # Twice, because kernels are built for every new shape.
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
        """Time candidates in turns, so that other load on the machine affects all of them alike."""
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
            for done, (profile, texts) in enumerate(self._work.items()):
                step = f"comparing the {len(running)} fastest: {profile}"
                progress(Step(step, done, len(self._work)))
                few = texts[: max(chosen[0].threads, 2)]
                # Twice, because kernels are built for every new shape.
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
    """Call each case once per round; each round begins with a different case.

    Args:
        cases: a case that raises a QrankError gets no further turn.
        rounds: minimum and maximum number of rounds.
        seconds: time after which no further round begins, once the minimum is reached.

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
