"""Steps of a long task, as `progress` functions are told them."""

from __future__ import annotations


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
