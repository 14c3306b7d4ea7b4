"""The memory that a model's batches share: what each takes, and what there is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qrank.bundle.dimensions import Dimensions
from qrank.errors import InputError, TargetError
from qrank.system import machine


class MemoryBudget:
    """Memory for batches. Those that run side by side share it; one that finds too little waits.

    First come, first served: behind a large one that waits, smaller ones wait too, or a stream of
    them would keep it waiting for ever.
    """

    def __init__(
        self,
        size: int | None = None,
        dimensions: Dimensions | None = None,
        *,
        strict: bool = True,
    ) -> None:
        """Say how much there is.

        Args:
            size: bytes. None: enough for everything.
            dimensions: of the model; None where nobody knows: then everything fits, too.
            strict: refuse what takes more, instead of computing it by itself.
        """
        self._dimensions = dimensions
        self._strict = strict
        self._size = None if dimensions is None else size
        self._free = self._size or 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @classmethod
    def beside(cls, files: int, limit: int | None, dimensions: Dimensions | None) -> MemoryBudget:
        """What is left beside a model.

        Args:
            files: bytes of the model.
            limit: bytes that both may take, strictly. None: half of what the machine, or its
                container, has beside the model; and what takes more has it for itself.
            dimensions: of the model; None where its bundle does not say.

        Raises:
            TargetError: nothing is left, or nobody knows what batches take.
        """
        if limit is None:
            whole = machine.memory()
            return cls(whole and max(whole - files, 0) // 2, dimensions, strict=False)
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
        """Count a device's own memory instead, where no bound was given; before any batch.

        Args:
            whole: bytes that it has.
            files: bytes of the model.
        """
        if self._size is not None and not self._strict:
            self._size = self._free = max(whole - files, 0) // 2

    def check(self, length: int, what: str) -> None:
        """Refuse a sequence that no batch may hold.

        Args:
            length: its tokens.
            what: to call it in the error.

        Raises:
            InputError: it takes more than there is.
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
        """Sequences of a length that fit at once, at least one. None: any number."""
        if self._size is None:
            return None
        return max(self._size // self._estimate_bytes(1, length, before), 1)

    @contextmanager
    def reserve(self, count: int, length: int, before: int = 0) -> Iterator[None]:
        """Hold a batch's memory, once there is as much."""
        if self._size is None:
            yield
            return
        # Never more than there is at all: that would wait for ever.
        taken = min(self._estimate_bytes(count, length, before), self._size)
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= taken)
                self._free -= taken
            finally:  # also where Ctrl-C ends the waiting
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()

    def _estimate_bytes(self, count: int, length: int, before: int) -> int:
        assert self._dimensions is not None  # or there would be no size
        return count * self._dimensions.estimate_bytes(length, before)
