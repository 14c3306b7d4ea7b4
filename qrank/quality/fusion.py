"""Several first stages as one: reciprocal rank fusion of TREC runs."""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

from qrank.errors import InputError
from qrank.quality.records import RunLine, kept_on_disk, run_lines
from qrank.system.textfiles import TextFile

K = 60
"""Added to every rank, as in the paper: the higher, the less the first ranks count."""


def fuse(orders: Iterable[Iterable[str]], k: int = K) -> dict[str, float]:
    """Fuse orders of documents: each document's sum of 1 / (k + rank), the best first.

    Ties keep the order in which the documents appear. G. V. Cormack, C. L. A. Clarke and
    S. Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods", SIGIR 2009.

    Args:
        orders: document ids, the best first; ranks count from 1.
        k: see `K`.
    """
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for order in orders:
        for rank, document in enumerate(order, 1):
            parts[document].append(1 / (k + rank))
    # fsum: the sum of equal parts is equal, whatever the order of the runs.
    sums = {document: math.fsum(found) for document, found in parts.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


class FusedRun:
    """TREC runs fused query by query, by their scores; ties keep a run's order of lines.

    Queries are in the order in which the runs name them, and need not be grouped. The lines are
    kept on disk: see `kept_on_disk`.

    Args:
        runs: two or more.

    Attributes:
        name: names of the runs, for errors.

    Raises:
        InputError: a line cannot be parsed, or repeats a document; the message names the line.
        OSError: the disk has no space for the lines.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        self._database = sqlite3.connect("")
        self._database.executescript(
            "CREATE TABLE query (id INTEGER PRIMARY KEY, name TEXT UNIQUE);"
            "CREATE TABLE line (query INTEGER, run INTEGER, document TEXT, score REAL,"
            " number INTEGER, PRIMARY KEY (query, run, document)) WITHOUT ROWID"
        )
        self._names: list[str] = []
        for place, run in enumerate(runs):
            with TextFile(run) as file:
                self._names.append(file.name)
                self._add(place, file)
        self.name = ", ".join(self._names)

    def __iter__(self) -> Iterator[RunLine]:
        """The fused lines; a line's place is that in the first run that has its document."""
        queries = self._database.execute("SELECT id, name FROM query ORDER BY id")
        for number, query in queries:
            lines = self._database.execute(
                "SELECT run, document, number FROM line WHERE query = ? "
                "ORDER BY run, score DESC, number",
                (number,),
            ).fetchall()
            places: dict[str, tuple[int, int]] = {}
            for run, document, at in lines:
                places.setdefault(document, (run, at))
            groups = groupby(lines, key=lambda line: line[0])
            fused = fuse([document for _, document, _ in group] for _, group in groups)
            for document, score in fused.items():
                run, at = places[document]
                yield RunLine(self._names[run], at, query, document, repr(score))

    def close(self) -> None:
        """Delete the lines."""
        self._database.close()

    def _add(self, run: int, file: TextFile) -> None:
        with closing(self._database.cursor()) as cursor, kept_on_disk():
            for line in run_lines(file):
                score = line.number_of_score()
                cursor.execute("INSERT OR IGNORE INTO query (name) VALUES (?)", (line.query,))
                cursor.execute("SELECT id FROM query WHERE name = ?", (line.query,))
                (query,) = cursor.fetchone()
                row = (query, run, line.document, score, line.number)
                try:
                    cursor.execute("INSERT INTO line VALUES (?, ?, ?, ?, ?)", row)
                except sqlite3.IntegrityError:
                    raise InputError(line.repeated()) from None
