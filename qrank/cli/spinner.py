"""A spinner that shows the current step on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from qrank.bundle.hub import stepping_aside


@contextmanager
def spinner() -> Iterator[Callable[[str], object]]:
    """Yield a function that shows its argument as the current step, if stderr is a terminal.

    The spinner pauses for the hub's progress bars: both at once would draw over each other.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    with console.status("starting") as status:

        @contextmanager
        def pause() -> Iterator[None]:
            status.stop()
            try:
                yield
            finally:
                status.start()

        with stepping_aside(pause):
            yield status.update
