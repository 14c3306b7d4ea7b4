"""Steps of a long task, as `progress` functions are told them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""


def no_progress(name: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""


class Step(str):
    """A step's description, which knows its place among equals.

    Attributes:
        done: how many of them are done.
        total: how many there are.
    """

    __slots__ = ("done", "total")

    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> Step:
        """See the class."""
        step = super().__new__(cls, text)
        step.done, step.total = done, total
        return step
