"""On Ctrl-C, SIGTERM or a closed terminal, leave no half-written file and no child process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_ENDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}
"""Signals that end a command, with exit code 128 + their number."""


class Ended(SystemExit):
    """A signal has ended the command. Files and processes are cleaned up as it propagates."""

    def __init__(self, number: int, advice: str = "") -> None:
        """Args: number: number of the signal. advice: text to add to the message."""
        super().__init__(128 + number)
        self.number = number
        self.message = ": ".join(filter(None, (_ENDS[signal.Signals(number).name], advice)))


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: no half-written file, no child left.

    A signal that is ignored, as under nohup, stays ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # ignore further ones
        raise Ended(number)

    ours = [number for number in _known() if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # Python sets signal handlers only in the main thread
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay signals that end a command, for steps that must not be interrupted in between."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled only in the main thread
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in _known()
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _known() -> list[int]:
    """The signals of `_ENDS` that this system has."""
    return [getattr(signal, name) for name in _ENDS if hasattr(signal, name)]


def die_of(end: Ended) -> None:
    """Die of SIGINT after Ctrl-C at a terminal: no exit code, not even 130, stops a bash loop."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    at_terminal = any(stream is not None and stream.isatty() for stream in streams)
    if end.number == signal.SIGINT and at_terminal and os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
