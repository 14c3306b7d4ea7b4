"""When a cascade may stop rescoring: the best documents are settled, within a stated error.

The last reranker of a cascade scores the kept documents in the earlier one's order. After m of
them, the *gap* is how far the k-th best of their logits lies above the logit that is foretold for
the next document: the mean of the m logits, plus `slope` times how far the earlier logit of the
next document lies from the mean of theirs. Rescoring stops when the gap exceeds a margin.

The margin is conformal. A query's *margin* is its largest gap while a document of the final top k
is still to be scored: with that margin or a larger one, its top k is right, whenever the gap is
looked at. Of n queries' margins, the ceil((1 - error) * (n + 1))-th smallest is right for another
query with a probability of at least 1 - error, if the queries are exchangeable (V. Vovk et al.,
"Algorithmic Learning in a Random World", 2005).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qrank.bundle.sequences import Logits
from qrank.errors import InputError
from qrank.system import paths
from qrank.system.disk import cannot_write
from qrank.system.safejson import parse_json

STEP = 8
"""Documents that are rescored between two looks at the gap."""

Query = tuple[Logits, Logits]
"""The earlier and the last reranker's logits of a query's kept documents, the earlier's order."""


@dataclass(frozen=True)
class Stage:
    """What a reranker of a cascade runs.

    Attributes:
        model: the bundle's name.
        target: the variant, and the backend if it is another package's.
        identity: of the variant's files.
        max_length: maximum number of tokens in a pair.
    """

    model: str
    target: str
    identity: str
    max_length: int


@dataclass(frozen=True)
class EarlyExit:
    """When to stop, fitted on queries that were rescored in full.

    Attributes:
        top_k: number of documents that are settled.
        keep: documents of a query that were rescored.
        slope: how much a step of the earlier logit moves the foretold one; 0 or more.
        margins: of the queries, ascending; those that need none are left out.
        queries: number of all queries.
    """

    top_k: int
    keep: int
    slope: float
    margins: list[float]
    queries: int

    def __post_init__(self) -> None:
        """Reject field types that a damaged file may hold."""
        numbers = (self.top_k, self.keep, self.slope, self.queries, *self.margins)
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"its fields are numbers, not {numbers}")

    @classmethod
    def fit(cls, line: Sequence[Query], queries: Sequence[Query], top_k: int) -> EarlyExit:
        """Fit the slope on some queries, and the margins on others: so these are exchangeable.

        Raises:
            InputError: there are no queries for one of them.
        """
        if not line or not queries:
            raise InputError(
                f"{len(line)} and {len(queries)} queries to fit an early exit on; 1 or more of "
                "each are needed"
            )
        above = sum(float(_centered(x) @ _centered(y)) for x, y in line)
        below = sum(float(_centered(x) @ _centered(x)) for x, _ in line)
        slope = max(above / below, 0.0) if below else 0.0
        found = [_margin(*query, slope, top_k) for query in queries]
        keep = max(len(query[0]) for query in queries)
        return cls(top_k, keep, slope, sorted(m for m in found if m is not None), len(queries))

    def margin(self, error: float) -> float:
        """The margin for an error; infinite if it needs more queries, or is 0.

        Args:
            error: share of queries, 0 to 1, whose top k may differ from that of full rescoring.
        """
        place = math.ceil((1 - error) * (self.queries + 1)) - 1
        if error <= 0 or place >= self.queries:
            return math.inf
        place -= self.queries - len(self.margins)
        return self.margins[place] if place >= 0 else -math.inf

    def settled(self, before: Logits, after: Logits, margin: float) -> bool:
        """Whether the top k is settled.

        Args:
            before: the earlier logits of all kept documents, in their order; shape [n].
            after: the last reranker's logits of the first m, 1 <= m < n; shape [m].
            margin: see `margin`.
        """
        return len(after) >= self.top_k and _gap(before, after, self.slope, self.top_k) > margin

    def rescored(self, before: Logits, after: Logits, margin: float) -> int:
        """How many documents are rescored of a query, if all logits are known; shapes [n]."""
        for stop in self.stops(len(before)):
            if stop < len(before) and self.settled(before, after[:stop], margin):
                return stop
        return len(before)

    def stops(self, count: int) -> list[int]:
        """After how many of `count` documents to look at the gap; the last is `count`."""
        return [*range(self.top_k, count, STEP), count]


def save(stages: Sequence[Stage], exit: EarlyExit) -> Path:
    """Save the early exit of a cascade; replaces an earlier one.

    Returns:
        The file's path.

    Raises:
        OSError: it cannot be written.
    """
    path = _path(stages)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomically(path, json.dumps(asdict(exit)) + "\n")
    except OSError as error:
        raise cannot_write(error, path, "QRANK_DATA names another folder") from error
    return path


def load(stages: Sequence[Stage]) -> EarlyExit:
    """The early exit of a cascade.

    Raises:
        InputError: there is none, or it is damaged; the message says how to make one.
    """
    path = _path(stages)
    names = " and ".join(f"{each.model} ({each.target})" for each in stages)
    again = "make one: qrank eval SMALL LARGE --data FOLDER"
    try:
        return EarlyExit(**parse_json(path.read_text("utf-8")))
    except FileNotFoundError:
        raise InputError(f"no early exit was fitted here for {names}; {again}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); {again}") from error


def _path(stages: Sequence[Stage]) -> Path:
    identity = hashlib.sha256(json.dumps([*map(asdict, stages)]).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", "-".join(each.model for each in stages))[:100]
    return paths.data_folder() / "cascades" / f"{name}-{identity}.json"


def _centered(logits: Logits) -> NDArray[np.float64]:
    centered: NDArray[np.float64] = logits.astype(np.float64) - logits.mean(dtype=np.float64)
    return centered


def _gap(before: Logits, after: Logits, slope: float, top_k: int) -> float:
    """How far the k-th best of the m logits lies above the one foretold for the next document."""
    count = len(after)
    beyond = float(before[count]) - before[:count].mean(dtype=np.float64)
    foretold = after.mean(dtype=np.float64) + slope * beyond
    return float(np.sort(after)[-top_k] - foretold)


def _margin(before: Logits, after: Logits, slope: float, top_k: int) -> float | None:
    """The largest gap of a query while a document of the top k is not scored; None if it is."""
    top = np.argsort(-after, kind="stable")[:top_k]
    last = int(top.max()) + 1 if len(top) else 0
    gaps = [_gap(before, after[:count], slope, top_k) for count in range(top_k, last)]
    return max(gaps, default=None)
