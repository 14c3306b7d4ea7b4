"""Ctrl-C, SIGTERM and a closed terminal: nothing is left half-written, and no child."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_ENDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}
"""Signals that end a command, with 128 and their number as its exit code."""


class Ended(SystemExit):
    """A signal has ended the command. Files and processes are let go of on the way up."""

    def __init__(self, number: int, advice: str = "") -> None:
        """Args: number: of the signal. advice: what else to say."""
        super().__init__(128 + number)
        self.number = number
        self.message = ": ".join(filter(None, (_ENDS[signal.Signals(number).name], advice)))


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: nothing half-written, no child left.

    One that is ignored, as under nohup, stays so.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # told once is enough
        raise Ended(number)

    ours = [number for number in _known() if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # elsewhere Python knows no signals
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let signals that end a command wait: for what must not be left between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they are handled in the main thread alone
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
    """Those of the signals that this system has."""
    return [getattr(signal, name) for name in _ENDS if hasattr(signal, name)]


def die_of(end: Ended) -> None:
    """Die of Ctrl-C at a terminal: a loop of bash goes on after an exit code, also after 130."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    at_terminal = any(stream is not None and stream.isatty() for stream in streams)
    if end.number == signal.SIGINT and at_terminal and os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
