"""Progress on stderr, for commands that take long."""

from __future__ import annotations

import sys
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

from qrank.quality.score_cache import Progress, no_progress


@contextmanager
def progress_bars(*, beside_results: bool = False) -> Iterator[Progress]:
    """Show one progress bar per name, with its rate and the time left, if stderr is a terminal.

    Args:
        beside_results: results are printed at the same time; if they go to the terminal, no bar
            is shown, because they would break it.
    """
    console = Console(stderr=True)
    if not console.is_terminal or (beside_results and sys.stdout.isatty()):
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    tasks: dict[str, Any] = {}
    with Bars(
        *columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False
    ) as bars:

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield show


class _Rate(ProgressColumn):
    """How many a second, or a minute if they are slow."""

    def render(self, task: Task) -> Text:
        """See rich."""
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{speed * 60:.1f}/min")
