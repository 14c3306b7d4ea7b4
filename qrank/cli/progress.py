"""Progress on stderr, for commands that take long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from qrank.quality.score_cache import Progress, no_progress


@contextmanager
def progress_bars(*, beside_results: bool = False) -> Iterator[Progress]:
    """Show one progress bar per name if stderr is a terminal.

    Args:
        beside_results: results are printed at the same time; if they go to the terminal, no bar
            is shown, because they would break it.
    """
    console = Console(stderr=True)
    if not console.is_terminal or (beside_results and sys.stdout.isatty()):
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, Any] = {}
    with Bars(
        *columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False
    ) as bars:

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield show
