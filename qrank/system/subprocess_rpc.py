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
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

from qrank import errors
from qrank.errors import QrankError, TargetError
from qrank.system.signals import held

_GOODBYE = 5.0
"""Seconds a process may take to end when it is told to, or was killed."""

_HELLO_SECONDS = 60.0
"""Seconds in which Python starts on the slowest machine."""

_HELLO = "qrank"
"""The first line a child writes: it has started, and what ends it from then on is the work's."""

_BOOTSTRAP = "import importlib, sys; importlib.import_module(sys.argv[1]).main()"

Questions = Mapping[str, Callable[..., dict[str, Any]]]
"""What a child can be asked, by name; called with the question's other fields."""

_answering = False
"""Whether this process is a child."""


def wanted() -> bool:
    """Whether what may crash should be tried in a child.

    Not where this process is one, nor in a frozen application, which has no Python to start.
    """
    return not _answering and not getattr(sys, "frozen", False)


class NoChildError(TargetError):
    """No Python could be started here."""


class CrashError(TargetError):
    """The child died; `how` is a signal's name, or an exit code in words."""

    def __init__(self, how: str, said: str) -> None:
        super().__init__(f"its process died ({how})" + (f": {said}" if said else ""))
        self.how = how
        self.said = said


class HangError(TargetError):
    """The child gave no answer in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:g} s: stopped")
        self.seconds = seconds


class Child:
    """A process that answers one question after the other, each a JSON object.

    Started anew with this process's interpreter and its module path; never forked, so it has none
    of its threads. What it writes to stdout or stderr on its own is kept for the reason it died of.
    It ends by itself when this process does.
    """

    def __init__(self, module: str) -> None:
        """Start it.

        Args:
            module: whose `main` calls `answer`.

        Raises:
            NoChildError: no process can be started.
        """
        import subprocess  # here, not above: importing qrank needs it not

        path = os.pathsep.join(place for place in sys.path if place)
        try:
            with held():  # Ctrl-C between the two would leave the process behind
                self._process = subprocess.Popen(
                    # -P: a file of the current folder never stands for a library's.
                    [sys.executable, "-P", "-c", _BOOTSTRAP, module],
                    env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                )
                weakref.finalize(self, _end, self._process, os.getpid())
        except OSError as error:
            raise NoChildError(f"no process can be started: {error}") from error
        self._greeted = False
        self._questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=3)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        # Threads, for no pipe can be timed, neither reading nor writing.
        self._helpers = [
            _thread(_write, self._process.stdin, self._questions),
            _thread(_read, self._process.stdout, self._answers.put),
            _thread(_read, self._process.stderr, self._keep),
        ]

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            NoChildError: the process ended before it could be asked anything.
            CrashError: it died.
            HangError: there was no answer in time. It is then killed, and must not be asked again.
            QrankError: what it answered with, of the same class; TargetError for anything else.
        """
        self._questions.put(json.dumps(question) + "\n")
        try:
            self._greet(seconds)
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close(kill=True)
            raise HangError(seconds) from None
        if not line:
            self.close(kill=True)
            raise CrashError(self._how(), " / ".join(self._said))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _error(**answer)
        return answer

    def greeted(self) -> Child:
        """The child, once it is known to have started.

        Raises:
            NoChildError: it has not.
        """
        try:
            self._greet(_HELLO_SECONDS)
        except queue.Empty:
            self.close(kill=True)
            raise NoChildError(f"{sys.executable} does not start within a minute") from None
        return self

    def close(self, *, kill: bool = False) -> None:
        """End the process, by force if need be."""
        import subprocess

        process = self._process
        self._questions.put(None)
        try:
            if not kill:
                process.wait(_GOODBYE)
        except subprocess.TimeoutExpired:
            kill = True
        if kill:
            process.kill()
            try:
                process.wait(_GOODBYE)
            except subprocess.TimeoutExpired:
                return  # held by a driver: the system ends it when that lets go
        for helper in self._helpers:
            helper.join(_GOODBYE)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(kill=kind is not None)

    def _keep(self, line: str) -> None:
        if line:
            self._said.append(line)

    def _greet(self, seconds: float) -> None:
        if self._greeted:
            return
        hello = self._answers.get(timeout=seconds)
        if hello != _HELLO:
            self.close(kill=True)
            said = " / ".join(filter(None, [hello, *self._said]))
            raise NoChildError(f"{sys.executable} does not start as Python ({self._how()}): {said}")
        self._greeted = True

    def _how(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0 and -code in {s.value for s in signal.Signals}:
            return signal.Signals(-code).name
        return f"exit code {code}"


def _end(process: Any, parent: int) -> None:
    """Kill a process that nobody closed, if it still runs: this one may be about to end."""
    if os.getpid() == parent and process.poll() is None:  # and not a fork of this one
        process.kill()
        process.wait(_GOODBYE)


def _thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True, name="qrank-child")
    thread.start()
    return thread


def _write(file: IO[str], questions: queue.SimpleQueue[str | None]) -> None:
    """Write questions until there is None, and then shut the pipe."""
    # Where the child has gone, who reads its answers is told.
    with suppress(OSError), file:
        while (question := questions.get()) is not None:
            file.write(question)
            file.flush()


def _read(file: IO[str], keep: Callable[[str], object]) -> None:
    """Hand each line to `keep`, and at the end ""."""
    with file:
        for line in file:
            if text := line.strip():
                keep(text)
    keep("")


def _error(error: str, kind: str = "") -> QrankError:
    """An error of the child's, as this process raises it."""
    known = getattr(errors, kind, None) if kind in errors.__all__ else None
    if isinstance(known, type) and issubclass(known, QrankError):
        return known(error)
    return TargetError(f"{kind}: {error}" if kind else error)


def answer(questions: Questions) -> None:
    """In the child: answer what is asked until nobody is there any more.

    Args:
        questions: by a question's "do"; called with its other fields.
    """
    global _answering
    _answering = True
    # Ctrl-C reaches a whole group of processes: it is for the one that asks to say so and end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Runtimes print to stdout as they like: there it would be an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line)
        # Whatever hangs here must not outlive who asked for it.
        os._exit(0)

    _thread(listen)
    _say(answers, _HELLO)
    while True:
        question = json.loads(asked.get())
        try:
            found = questions[question.pop("do")](**question)
        except Exception as error:  # a backend may raise anything, and the next question may work
            found = {"error": str(error), "kind": type(error).__name__}
        _say(answers, json.dumps(found))


def _say(file: IO[str], line: str) -> None:
    file.write(line + "\n")
    file.flush()
