"""A Python process that answers questions, and may hang or die: what asks lives on."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any

from qrank.errors import TargetError
from qrank.signals import held

_GOODBYE = 5.0
"""Seconds a process may take to end when it is told to, or was killed."""


class Child:
    """A process that answers one question after the other, each a JSON object.

    Started anew with this process's interpreter and its module path; never forked, so it has none
    of its threads. What it writes to stdout or stderr on its own is kept for the reason it died of.
    """

    def __init__(self, module: str) -> None:
        """Start it.

        Args:
            module: run by `python -m`; calls `answer`.
        """
        import subprocess  # here, not above: importing qrank needs it not

        path = os.pathsep.join(place for place in sys.path if place)
        with held():  # Ctrl-C between the two would leave the process behind
            self._process = subprocess.Popen(
                # -P: a file of the current folder never stands for a library's.
                [sys.executable, "-P", "-m", module],
                env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            weakref.finalize(self, _end, self._process, os.getpid())
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=3)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            _read(self._process.stdout, self._answers.put),
            _read(self._process.stderr, self._said.append),
        ]

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            TargetError: an error, the death of the process, or no answer in time; it is then
                killed, and must not be asked again.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close(kill=True)
            raise TargetError(f"no answer within {seconds:g} s: stopped") from None
        except OSError:
            line = ""  # it has gone: the reader says so too
        if not line:
            self.close(kill=True)
            raise TargetError(self._cause_of_death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TargetError(answer["error"])
        return answer

    def close(self, *, kill: bool = False) -> None:
        """End the process, by force if need be."""
        import subprocess

        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.close()
        except OSError:  # what was not yet written has no reader
            kill = True
        if not kill:
            try:
                process.wait(_GOODBYE)
            except subprocess.TimeoutExpired:
                kill = True
        if kill:
            process.kill()
            try:
                process.wait(_GOODBYE)
            except subprocess.TimeoutExpired:
                return  # held by a driver: the system ends it when that lets go
        for reader in self._readers:
            reader.join(_GOODBYE)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(kill=kind is not None)

    def _cause_of_death(self) -> str:
        code = self._process.returncode
        said = f": {' / '.join(self._said)}" if self._said else ""
        if code is not None and code < 0 and -code in {s.value for s in signal.Signals}:
            return f"its process crashed ({signal.Signals(-code).name}){said}"
        return f"its process ended (exit code {code}){said}"


def _end(process: Any, parent: int) -> None:
    """Kill a process that nobody closed, if it still runs: this one may be about to end."""
    if os.getpid() == parent and process.poll() is None:  # and not a fork of this one
        process.kill()
        process.wait(_GOODBYE)


def _read(file: IO[str], keep: Callable[[str], None]) -> threading.Thread:
    """Hand each line to `keep`, and at the end ""; on a thread, for no pipe can be timed."""

    def run() -> None:
        with file:
            for line in file:
                if text := line.strip():
                    keep(text)
        keep("")

    thread = threading.Thread(target=run, daemon=True, name="qrank-child")
    thread.start()
    return thread


def answer(questions: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """In the child: answer what is asked until nobody is there any more.

    Args:
        questions: by a question's "do"; called with its other fields.
    """
    # Runtimes print to stdout as they like: there it would be an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            found = questions[question.pop("do")](**question)
        except Exception as error:  # a backend may raise anything, and the next question may work
            kind = "" if isinstance(error, TargetError) else f"{type(error).__name__}: "
            found = {"error": f"{kind}{error}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
