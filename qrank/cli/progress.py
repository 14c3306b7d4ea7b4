"""Progress on stderr, for commands that take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from qrank.cli.common import notice
from qrank.system.steps import Progress, no_progress

EVERY = 60.0
"""Seconds between two lines about progress, where no bar can be drawn."""


@contextmanager
def progress_bars(*, beside_results: bool = False, lines: bool = False) -> Iterator[Progress]:
    """Show one progress bar per name, with its rate and the time left, if stderr is a terminal.

    Args:
        beside_results: results are printed at the same time; if they go to the terminal, no bar
            is shown, because they would break it.
        lines: if stderr is no terminal, print a line a minute: for logs of long jobs.
    """
    console = Console(stderr=True)
    if not console.is_terminal or (beside_results and sys.stdout.isatty()):
        yield _Lines() if lines else no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    tasks: dict[str, Any] = {}
    with Bars(
        *columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False
    ) as bars:

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield show


class _Rate(ProgressColumn):
    """How many a second, or a minute if they are slow."""

    def render(self, task: Task) -> Text:
        """See rich."""
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{speed * 60:.1f}/min")


class _Lines:
    """A `Progress` that prints a line a minute, with the rate of that minute."""

    def __init__(self) -> None:
        self._told: tuple[float, int] | None = None

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._told is None:
            self._told = now, done
            return
        since = now - self._told[0]
        if since < EVERY:
            return
        rate = (done - self._told[1]) / since
        left = f", {_time((total - done) / rate)} left" if rate else ""
        notice(f"{name}: {done:,} of {total:,}, {rate:,.1f}/s{left}")
        self._told = now, done


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
