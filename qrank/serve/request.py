"""Tasks and their outcomes: what requests and answers of all dialects have in common."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qrank.scoring.inputs import LongDocuments, ModelInput
from qrank.scoring.ranking import ScoredPairs

CHARACTERS_A_TOKEN = 4
"""Used to estimate a request's tokens before it is encoded."""


class RequestError(Exception):
    """A request that gets an error: a status, and a message that says what to do."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        documents: in one request.
        characters: in one text.
        body: bytes of the body.
        body_seconds: for a body to arrive.
        queue_tokens: tokens that may wait for a model.
        seconds: for an answer, including the wait.
    """

    documents: int = 2_000
    characters: int = 1_000_000
    body: int = 10_000_000
    body_seconds: float = 10.0
    queue_tokens: int = 500_000
    seconds: float = 60.0

    @classmethod
    def unlimited(cls) -> Limits:
        """For requests that the user has on this machine."""
        return cls(*[sys.maxsize] * 6)


@dataclass(frozen=True)
class Defaults:
    """What holds for requests that do not say it.

    Attributes:
        instructions: name of a model -> instruction; a model that is missing has none.
        long_documents: as for `Reranker.rank`.
        budget: seconds; None: no limit.
        raw: whether scores are logits.
    """

    instructions: Mapping[str, str] = field(default_factory=dict)
    long_documents: LongDocuments = "truncate"
    budget: float | None = None
    raw: bool = False


@dataclass(frozen=True)
class RerankTask:
    """A request, whatever its dialect.

    Attributes:
        model: name of a served model; None: the first.
        pairs: (query, document), in the order they were sent.
        instruction: as for `Reranker.rank`.
        long_documents: as for `Reranker.rank`; None: the server's default.
        document_tokens: maximum tokens read of a document; None: as many as fit.
        budget: seconds, with the promise of `qrank.scoring.deadline`; None: the server's default.
        whole: refuse a pair that does not fit.
    """

    model: str | None
    pairs: list[tuple[str, str]]
    instruction: str | None
    long_documents: LongDocuments | None
    document_tokens: int | None
    budget: float | None
    whole: bool = False

    def estimate_tokens(self, max_length: int) -> int:
        """Estimate its tokens before encoding, at most `max_length` a pair, unless chunked."""
        limit = math.inf if self.long_documents == "chunk" else max_length
        sizes = (len(query) + len(document) for query, document in self.pairs)
        return int(sum(min(size // CHARACTERS_A_TOKEN + 1, limit) for size in sizes))


@dataclass(frozen=True)
class RerankOutcome:
    """The result of a task, in the order of the pairs.

    Attributes:
        model: name of the model that scored the pairs.
        logits: floats; pairs that were not scored have the lowest logit of the others.
        scores: after the family's activation; pairs that were not scored have the lowest score.
        truncated: whether only a part was read.
        scored: False if the time was up before the pair's turn; the first is always True.
        order: indices of the pairs, most relevant first; then those not scored, as sent.
        tokens: number that the model read.
        seconds: from the request's arrival to its last score.
        cached: number of pairs whose scores were in the cache; None without a cache.
    """

    model: str
    logits: list[float]
    scores: list[float]
    truncated: list[bool]
    scored: list[bool]
    order: list[int]
    tokens: int
    seconds: float
    cached: int | None = None

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
        cached: int | None = None,
    ) -> RerankOutcome:
        """The outcome for a number of pairs of which the first ones were scored.

        Args:
            model: see the class.
            pairs: number of pairs.
            inputs: of the pairs that were encoded.
            found: the pairs that were scored: one or more.
            tokens: see the class.
            seconds: see the class.
            cached: see the class.
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
            cached=cached,
        )
