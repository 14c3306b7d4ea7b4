"""The memory that this thread's signal handlers run in, where a library replaces it."""

from __future__ import annotations

import ctypes
import sys


class _Stack(ctypes.Structure):
    """Linux's `stack_t`."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


class SignalStack:
    """This thread's alternate signal stack as it is now (see sigaltstack(2)); only on Linux.

    Python's handlers run in it if there is one: memory that was unmapped kills the process.
    """

    def __init__(self) -> None:
        """Take note of it."""
        self._now = _Stack()
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self._libc is not None:
            self._libc.sigaltstack(None, ctypes.byref(self._now))

    def restore(self) -> bool:
        """Make it this thread's again; False if it is too small for this CPU by now (AMX)."""
        return self._libc is None or self._libc.sigaltstack(ctypes.byref(self._now), None) == 0
