"""The memory budget that a model's batches share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qrank.bundle.dimensions import Dimensions
from qrank.errors import InputError, TargetError
from qrank.system import machine


class MemoryBudget:
    """Memory budget for batches. Parallel batches share it; one that finds too little left waits.

    First come, first served: smaller batches queue behind a large one that waits; otherwise a
    stream of small ones could starve it.
    """

    sharers = 1
    """Processes like this one on the machine: without a limit, each takes a part of its memory."""

    def __init__(
        self,
        size: int | None = None,
        dimensions: Dimensions | None = None,
        *,
        strict: bool = True,
    ) -> None:
        """Set the budget.

        Args:
            size: bytes. None: unlimited.
            dimensions: of the model; None if unknown, which means unlimited as well.
            strict: refuse a sequence that takes more, instead of computing it alone.
        """
        self._dimensions = dimensions
        self._strict = strict
        self._size = None if dimensions is None else size
        self._free = self._size or 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @classmethod
    def beside(cls, files: int, limit: int | None, dimensions: Dimensions | None) -> MemoryBudget:
        """The budget that remains next to a loaded model.

        Args:
            files: bytes of the model.
            limit: strict limit in bytes for model and batches together. None: half of the memory
                that the machine, or its container, has besides the model, of this process' part
                (`sharers`); a batch that takes more runs alone.
            dimensions: of the model; None if its bundle does not contain them.

        Raises:
            TargetError: `limit` leaves nothing, or the memory that batches take is unknown.
        """
        if limit is None:
            whole = machine.memory()
            own = whole and max(whole // cls.sharers - files, 0) // 2
            return cls(own, dimensions, strict=False)
        if dimensions is None:
            raise TargetError(
                "the bundle does not say its model's dimensions, so its memory cannot be bounded: "
                "convert it again, or leave out --max-memory"
            )
        if limit <= files:
            raise TargetError(
                f"its files alone take {files / 1e6:,.0f} MB, and --max-memory is "
                f"{limit / 1e6:,.0f} MB"
            )
        return cls(limit - files, dimensions)

    def move(self, whole: int, files: int) -> None:
        """Use a device's own memory instead, unless a limit was given; call before any batch.

        Args:
            whole: bytes of the device's memory.
            files: bytes of the model.
        """
        if self._size is not None and not self._strict:
            self._size = self._free = max(whole // self.sharers - files, 0) // 2

    def check(self, length: int, what: str) -> None:
        """Refuse a sequence that exceeds a strict budget.

        Args:
            length: its number of tokens.
            what: its name in the error message.

        Raises:
            InputError: it takes more than the budget.
        """
        if self._size is None or not self._strict:
            return
        if (taken := self._estimate_bytes(1, length, 0)) > self._size:
            raise InputError(
                f"{what} has {length:,} tokens with its query, which take about "
                f"{taken / 1e6:,.0f} MB beside the model; {self._size / 1e6:,.0f} MB are left: "
                "allow more (--max-memory), or fewer tokens (--max-length)"
            )

    def max_batch_size(self, length: int, before: int = 0) -> int | None:
        """Maximum number of sequences of a length that fit at once, at least 1. None: unlimited."""
        if self._size is None:
            return None
        return max(self._size // self._estimate_bytes(1, length, before), 1)

    @contextmanager
    def reserve(self, count: int, length: int, before: int = 0) -> Iterator[None]:
        """Reserve a batch's memory, waiting until that much is free."""
        if self._size is None:
            yield
            return
        # Never more than the whole budget: that would wait forever.
        taken = min(self._estimate_bytes(count, length, before), self._size)
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= taken)
                self._free -= taken
            finally:  # also if Ctrl-C interrupts the wait
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()

    def _estimate_bytes(self, count: int, length: int, before: int) -> int:
        assert self._dimensions is not None  # otherwise `_size` is None
        return count * self._dimensions.estimate_bytes(length, before)
