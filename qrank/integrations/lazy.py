"""A reranker that is opened when it is first used: hosts make, copy and store components early."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from qrank.backends.forks import waited_for
from qrank.reranker import Ranking, Reranker


class LazyReranker:
    """Opens a `Reranker` at the first call. Thread-safe; copies and pickles as its arguments."""

    def __init__(self, model: str, options: Mapping[str, Any] | None = None) -> None:
        """Keep the arguments.

        Args:
            model: as for `Reranker`.
            options: other arguments of `Reranker`, by name.
        """
        self._arguments = (model, dict(options or {}))
        self._lock = waited_for(threading.RLock())
        self._reranker: Reranker | None = None

    def __call__(self) -> Reranker:
        """The reranker, opened if it is not yet.

        Raises:
            QrankError: as for `Reranker`.
        """
        with self._lock:
            if self._reranker is None:
                model, options = self._arguments
                self._reranker = Reranker(model, **options)
            return self._reranker

    def of(self, model: str, options: Mapping[str, Any]) -> LazyReranker:
        """This one if it has these arguments; otherwise another.

        Hosts copy components with some of their fields changed, and so can users.
        """
        wanted = (model, dict(options))
        return self if wanted == self._arguments else LazyReranker(*wanted)

    def close(self) -> None:
        """Free the model; the next call opens it again."""
        with self._lock:
            opened, self._reranker = self._reranker, None
        if opened is not None:
            opened.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """For `pickle` and `copy`."""
        return type(self), self._arguments


def score_of(found: Ranking) -> float | None:
    """A document's score; None if a budget left it unscored."""
    return found.score if found.scored else None
