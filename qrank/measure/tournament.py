"""Targets timed on the same documents, each in a process of its own; the fastest in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from qrank.errors import QrankError
from qrank.measure.candidates import Candidate
from qrank.measure.discover import Responder, start
from qrank.measure.profiles import QUERY
from qrank.select.measurements import Measurement, Profile
from qrank.system import machine

FIRST_LOOK_SECONDS = 0.5
"""Seconds that a first look at a target spends on a profile."""

SKIP_FACTOR = 3.0
"""So many times slower than the best so far, and a target gets no more than a glance."""

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

ProfileTexts = Mapping[Profile, list[str]]
"""Documents to time a target on, by profile; the query is QUERY."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Look:
    """A candidate after a first look: what was measured, and the most memory it held, in bytes."""

    candidate: Candidate
    measurement: Measurement
    peak: int


def room() -> float:
    """Bytes that targets may take beside each other.

    Where the system does not tell what is free, a part of what it has, or of a small machine's.
    """
    free = machine.free_memory()
    if free is not None:
        return free * 0.7
    return (machine.memory() or 4 * 2**30) * 0.4


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
        timeout: see `tune`.
        query: they are ranked for.
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
        """A candidate, opened in a process of its own.

        Raises:
            QrankError: it cannot be used; with the reason.
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
            candidate: it.
            expected: seconds that it should take, by what is known of others; None: nothing is.
        """
        if self._timeout is not None:
            return self._timeout
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
