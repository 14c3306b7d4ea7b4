"""llama.cpp contexts, which a model computes in, and how both are freed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence

from qrank.backends import llama


class Context:
    """A context for one batch at a time; created at first use, recreated for a larger batch."""

    def __init__(
        self,
        model: object,
        sequences: int,
        growth: int,
        settings: Callable[[int], dict[str, object]],
    ) -> None:
        """Create nothing yet.

        Args:
            model: from `llama.load`.
            sequences: maximum number in a batch.
            growth: its capacity in tokens is a multiple of this.
            settings: capacity -> more settings for `llama.new_context`.
        """
        self._model = model
        self._sequences = sequences
        self._growth = growth
        self._settings = settings
        self._room = 0
        self._pointer: object = None

    def fit(self, tokens: int) -> object:
        """llama.cpp's context pointer, with room for a batch; without room llama.cpp would abort.

        Args:
            tokens: of the batch; 0 for the context as it already is.

        Raises:
            TargetError: there is no memory for that many tokens.
        """
        if not self._pointer or tokens > self._room:
            self.close()
            self._room = -(-tokens // self._growth) * self._growth
            settings = self._settings(self._room)
            self._pointer = llama.new_context(self._model, self._room, self._sequences, **settings)
        return self._pointer

    def close(self) -> None:
        """Free the context; a later use recreates it."""
        if self._pointer:
            llama.library().llama_free(self._pointer)
        self._pointer = None


def freed_with(
    backend: object, model: object, contexts: Sequence[Context]
) -> weakref.finalize[[], object]:
    """A finalizer that frees a model and its contexts, when called or when the backend is dropped.

    It may run on any thread and waits for none: a backend without references computes nothing.
    It does nothing at interpreter exit or in a forked child, which lacks the threads that llama.cpp
    waits for; there the operating system frees the memory.
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
