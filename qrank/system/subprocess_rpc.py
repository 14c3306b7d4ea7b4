"""A child Python process that answers questions; if it hangs or dies, the parent survives."""

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
from qrank.system.frozen import frozen
from qrank.system.signals import held

_GOODBYE = 5.0
"""Seconds a process may take to end after it was told to, or was killed."""

_HELLO_SECONDS = 60.0
"""Seconds that Python may take to start on the slowest machine."""

_HELLO = "qrank"
"""First line a child writes: it has started, so if it dies later, its work is the cause."""

_BOOTSTRAP = "import importlib, sys; importlib.import_module(sys.argv[1]).main()"

Questions = Mapping[str, Callable[..., dict[str, Any]]]
"""Functions that answer a child's questions, by name; called with the question's other fields."""

_answering = False
"""Whether this process is a child."""


def wanted() -> bool:
    """Whether to try code that may crash in a child.

    False if this process is a child, or a frozen application, which has no Python to start.
    """
    return not _answering and not frozen()


class NoChildError(TargetError):
    """No Python process could be started."""


class CrashError(TargetError):
    """The child died; `how` is a signal's name, or an exit code in words."""

    def __init__(self, how: str, said: str) -> None:
        super().__init__(f"its process died ({how})" + (f": {said}" if said else ""))
        self.how = how
        self.said = said


class HangError(TargetError):
    """The child gave no answer in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {round(seconds, 1):g} s: stopped")
        self.seconds = seconds


class Child:
    """A process that answers questions one after the other, each a JSON object.

    It is started with this process's interpreter and module path, not forked, so it inherits no
    threads. The last lines that it writes to stdout or stderr are kept to explain a crash. It ends
    when this process ends.
    """

    def __init__(self, module: str) -> None:
        """Start it.

        Args:
            module: module whose `main` calls `answer`.

        Raises:
            NoChildError: no process can be started.
        """
        import subprocess  # here, because importing qrank does not need it

        path = os.pathsep.join(place for place in sys.path if place)
        try:
            with held():  # Ctrl-C before `finalize` would leave the process behind
                self._process = subprocess.Popen(
                    # -P: files in the current folder must not shadow libraries.
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
        # Threads, because reads and writes of a pipe have no timeout.
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
            QrankError: the error it answered with, of the same class; any other error becomes a
                TargetError.
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
        """Wait until the child has started, and return it.

        Raises:
            NoChildError: it does not start.
        """
        try:
            self._greet(_HELLO_SECONDS)
        except queue.Empty:
            self.close(kill=True)
            raise NoChildError(f"{sys.executable} does not start within a minute") from None
        return self

    def close(self, *, kill: bool = False) -> None:
        """End the process, by force if necessary."""
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
                return  # blocked in a driver: the system ends it when the driver returns
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
    """Kill a process that was never closed, if it still runs: this process may be ending."""
    if os.getpid() == parent and process.poll() is None:  # not in a fork of this process
        process.kill()
        process.wait(_GOODBYE)


def _thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True, name="qrank-child")
    thread.start()
    return thread


def _write(file: IO[str], questions: queue.SimpleQueue[str | None]) -> None:
    """Write questions until None comes, then close the pipe."""
    # If the child has died, the reader of its answers reports it.
    with suppress(OSError), file:
        while (question := questions.get()) is not None:
            file.write(question)
            file.flush()


def _read(file: IO[str], keep: Callable[[str], object]) -> None:
    """Pass each line that is not blank to `keep`, and "" at the end."""
    with file:
        for line in file:
            if text := line.strip():
                keep(text)
    keep("")


def _error(error: str, kind: str = "") -> QrankError:
    """The child's error as an exception to raise in this process."""
    known = getattr(errors, kind, None) if kind in errors.__all__ else None
    if isinstance(known, type) and issubclass(known, QrankError):
        return known(error)
    return TargetError(f"{kind}: {error}" if kind else error)


def answer(questions: Questions) -> None:
    """In the child: answer questions until the parent is gone.

    Args:
        questions: selected by a question's "do", and called with its other fields.
    """
    global _answering
    _answering = True
    # Ctrl-C reaches the whole process group: the parent reports it and ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Runtimes print to stdout: redirect that to stderr, or it would be read as an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line)
        # Code that hangs here must not outlive the parent.
        os._exit(0)

    _thread(listen)
    _say(answers, _HELLO)
    while True:
        question = json.loads(asked.get())
        try:
            found = questions[question.pop("do")](**question)
        except Exception as error:  # a backend may raise anything; the next question may still work
            found = {"error": str(error), "kind": type(error).__name__}
        _say(answers, json.dumps(found))


def _say(file: IO[str], line: str) -> None:
    file.write(line + "\n")
    file.flush()
