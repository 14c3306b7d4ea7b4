"""What a model on llama.cpp computes in, and how both are freed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence

from qrank.backends import llama


class Context:
    """What one batch at a time is computed in; made at its first use, anew for a larger batch."""

    def __init__(
        self,
        model: object,
        sequences: int,
        growth: int,
        settings: Callable[[int], dict[str, object]],
    ) -> None:
        """Make nothing yet.

        Args:
            model: of `llama.load`.
            sequences: that a batch may have.
            growth: it has room for a multiple of so many tokens.
            settings: the room -> more settings of `llama.new_context`.
        """
        self._model = model
        self._sequences = sequences
        self._growth = growth
        self._settings = settings
        self._room = 0
        self._pointer: object = None

    def fit(self, tokens: int) -> object:
        """llama.cpp's pointer, with room for a batch: it ends the process where there is none.

        Args:
            tokens: of the batch; 0 for what is there already.

        Raises:
            TargetError: there is no memory for so many tokens.
        """
        if not self._pointer or tokens > self._room:
            self.close()
            self._room = -(-tokens // self._growth) * self._growth
            settings = self._settings(self._room)
            self._pointer = llama.new_context(self._model, self._room, self._sequences, **settings)
        return self._pointer

    def close(self) -> None:
        """Free it; a later use makes it again."""
        if self._pointer:
            llama.library().llama_free(self._pointer)
        self._pointer = None


def freed_with(
    backend: object, model: object, contexts: Sequence[Context]
) -> weakref.finalize[[], object]:
    """What frees a model and its contexts: when it is called, or else when a backend is dropped.

    It waits for no thread, as it may run on any: a backend that nobody holds computes nothing.
    Never at the interpreter's end, nor in a forked child, which has none of the threads that
    llama.cpp waits for: the system frees all of it there.
    """
    process = os.getpid()

    def free() -> None:
        if os.getpid() == process:
            for context in contexts:
                context.close()
            llama.library().llama_model_free(model)

    freed = weakref.finalize(backend, free)
    freed.atexit = False
    return freed
