"""Locks that a fork waits for: no child inherits one that a thread it lacks holds for ever.

A runtime has locks of its own that are out of reach: MKL's memory, torch's loading. So a lock of
ours stands around the calls that take them, and a process forks while it is free.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, TypeVar

Lock = TypeVar("Lock")

_guards: weakref.WeakSet[Any] = weakref.WeakSet()

_taken: list[Any] = []
"""By the thread that forks, while it does."""


def waited_for(lock: Lock) -> Lock:
    """A `threading.Lock` or `RLock` that only the forking thread may hold as a process forks."""
    _guards.add(lock)
    return lock


def _take() -> None:
    # All or none: who holds one of them may be waiting for another.
    while (busy := _take_free()) is not None:
        _let_go()
        with busy:
            pass


def _take_free() -> Any:
    """Take locks up to the first that is not free, which is returned; None: all are taken."""
    for lock in list(_guards):
        if not lock.acquire(blocking=False):
            return lock
        _taken.append(lock)
    return None


def _let_go() -> None:
    while _taken:
        _taken.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take, after_in_parent=_let_go, after_in_child=_let_go)
