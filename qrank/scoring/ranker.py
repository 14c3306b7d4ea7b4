"""What `Reranker` and `Cascade` share: one way to rank, also from asyncio, and to be closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from qrank.scoring.inputs import LongDocuments
from qrank.scoring.ranking import Rankings


class Ranker(ABC):
    """Ranks documents. Pickling or copying opens it again with the same arguments."""

    _arguments: dict[str, Any]
    """Of the constructor."""

    @abstractmethod
    def rank(
        self,
        query: str,
        documents: Iterable[str | Mapping[str, Any]],
        *,
        text_key: str = "text",
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Rankings:
        """Order documents by relevance, most relevant first."""

    @abstractmethod
    def close(self) -> None:
        """Free the models; the next use loads them again."""

    async def arank(
        self,
        query: str,
        documents: Iterable[str | Mapping[str, Any]],
        *,
        text_key: str = "text",
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Rankings:
        """As `rank`, in a thread of asyncio's pool: the event loop goes on meanwhile.

        Calls may run at once, and share the CPU threads that the models were opened with.
        `budget_ms` counts from when the thread begins. A call that is cancelled stops waiting; its
        thread still finishes.
        """
        # Who awaits has imported it; others' start needs not take the time.
        from asyncio import to_thread

        return await to_thread(
            self.rank,
            query,
            documents,
            text_key=text_key,
            top_k=top_k,
            instruction=instruction,
            long_documents=long_documents,
            budget_ms=budget_ms,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For `pickle` and `copy`: open again with the same arguments."""
        return partial(type(self), **self._arguments), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
