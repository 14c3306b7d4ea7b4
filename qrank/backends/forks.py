"""Locks that a fork waits for, so that no child inherits one held by a thread it does not have.

Runtimes have internal locks that we cannot reach: MKL's memory, torch's loading. So a lock of ours
guards the calls that take them, and the process forks only while no other thread holds it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, TypeVar

Lock = TypeVar("Lock")

_guards: weakref.WeakSet[Any] = weakref.WeakSet()

_forking = threading.RLock()
"""Held by the thread that forks: threads that fork at once do so one after the other."""

_taken: list[Any] = []
"""Locks that the forking thread holds during the fork."""


def waited_for(lock: Lock) -> Lock:
    """Register a `threading.Lock` or `RLock` that no other thread may hold during a fork."""
    _guards.add(lock)
    return lock


def _before() -> None:
    _forking.acquire()
    # All or nothing: a thread that holds one of them may be waiting for another.
    while (busy := _take_free()) is not None:
        _let_go()
        with busy:
            pass


def _take_free() -> Any:
    """Take locks; return the first one that is not free, or None once all are taken."""
    for lock in list(_guards):
        if not lock.acquire(blocking=False):
            return lock
        _taken.append(lock)
    return None


def _let_go() -> None:
    while _taken:
        _taken.pop().release()


def _after() -> None:
    _let_go()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
