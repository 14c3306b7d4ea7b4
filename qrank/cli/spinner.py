"""A spinner that shows the current step on a terminal, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qrank.bundle.hub import stepping_aside
from qrank.system.steps import Step


@contextmanager
def spinner() -> Iterator[Callable[[str], object]]:
    """Yield a function that shows its argument as the current step, if stderr is a terminal.

    Next to it stands the time since the beginning; of a `Step`, also its number, and the time left
    if the others take as long. The spinner pauses for the hub's progress bars: both at once would
    draw over each other.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    left = TextColumn("{task.fields[left]}")
    with Progress(*columns, left, console=console, transient=True, redirect_stdout=False) as shown:
        task = shown.add_task("starting", total=None, left="")

        @contextmanager
        def pause() -> Iterator[None]:
            shown.stop()
            try:
                yield
            finally:
                shown.start()

        counted = _Counted()

        def show(step: str) -> None:
            description, left = counted(step)
            shown.update(task, description=description, left=left)

        with stepping_aside(pause):
            yield show


class _Counted:
    """Adds to steps their number, and estimates the time left from those that are done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = (0.0, 0, 0)  # the time, what was done, the total

    def __call__(self, step: str) -> tuple[str, str]:
        """The step with its number, and the time left: "" if it is unknown."""
        if not isinstance(step, Step) or step.total < 2:
            return step, ""
        began, first, total = self._began
        if total != step.total or step.done < first:
            began, first, _ = self._began = (self._clock(), step.done, step.total)
        done = step.done - first
        number = f"{step} ({step.done + 1} of {step.total})"
        if not done:
            return number, ""
        seconds = round((self._clock() - began) / done * (step.total - step.done))
        return number, f"about {seconds // 60}:{seconds % 60:02} left"
