"""What a request of any dialect comes to, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qrank.scoring.inputs import LongDocuments, ModelInput
from qrank.scoring.ranking import ScoredPairs

CHARACTERS_A_TOKEN = 4
"""To judge a request by before it is encoded."""


class RequestError(Exception):
    """A request that gets an error: a status, and a message that says what to do."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        documents: of one request.
        characters: of one text.
        body: bytes.
        body_seconds: for a body to come in.
        queue_tokens: that may wait for a model.
        seconds: for an answer, with the waiting.
    """

    documents: int = 2_000
    characters: int = 1_000_000
    body: int = 10_000_000
    body_seconds: float = 10.0
    queue_tokens: int = 500_000
    seconds: float = 60.0


@dataclass(frozen=True)
class RerankTask:
    """What any request comes to.

    Attributes:
        model: name of a served model; None: the first.
        pairs: (query, document), in the order they were sent.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`.
        document_tokens: most tokens that are read of a document; None: what fits.
        budget: seconds, promised as `qrank.scoring.deadline` says; None: no end.
        whole: refuse a pair that does not fit.
    """

    model: str | None
    pairs: list[tuple[str, str]]
    instruction: str | None
    long_documents: LongDocuments
    document_tokens: int | None
    budget: float | None
    whole: bool = False

    def estimate_tokens(self, max_length: int) -> int:
        """Tokens of it, before it is encoded, where a pair may have so many."""
        limit = math.inf if self.long_documents == "chunk" else max_length
        sizes = (len(query) + len(document) for query, document in self.pairs)
        return int(sum(min(size // CHARACTERS_A_TOKEN + 1, limit) for size in sizes))


@dataclass(frozen=True)
class RerankOutcome:
    """What came of it, in the order of the pairs.

    Attributes:
        model: that scored them.
        logits: floats; of pairs that were not scored the lowest of the others'.
        scores: after the family's activation, likewise.
        truncated: whether only a part was read.
        scored: False where the time was up; the first is True.
        order: places of the pairs, the most relevant first; then what was not scored, as sent.
        tokens: that the model read.
        seconds: from the request's coming to its last score.
    """

    model: str
    logits: list[float]
    scores: list[float]
    truncated: list[bool]
    scored: list[bool]
    order: list[int]
    tokens: int
    seconds: float

    @classmethod
    def of(
        cls,
        model: str,
        pairs: int,
        inputs: Iterable[ModelInput],
        found: ScoredPairs,
        *,
        tokens: int,
        seconds: float,
    ) -> RerankOutcome:
        """What came of so many pairs, the first of which were scored.

        Args:
            model: see the class.
            pairs: how many there are.
            inputs: of those that were encoded.
            found: those that were scored: one or more.
            tokens: see the class.
            seconds: see the class.
        """
        left = pairs - len(found)
        lowest = int(found.logits.argmin())
        truncated = [False] * pairs
        for each in inputs:
            truncated[each.owner] |= each.truncated
        return cls(
            model,
            logits=[*found.logits.tolist(), *[float(found.logits[lowest])] * left],
            scores=[*found.scores.tolist(), *[float(found.scores[lowest])] * left],
            truncated=truncated,
            scored=[True] * len(found) + [False] * left,
            order=[*found.order, *range(len(found), pairs)],
            tokens=tokens,
            seconds=seconds,
        )
