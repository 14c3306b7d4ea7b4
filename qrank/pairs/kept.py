"""Scores of a file's chunks, kept until the file is whole: a killed run goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from qrank.pairs.folder import append
from qrank.scoring.activation import Scores

_DIGEST = hashlib.sha256().digest_size


class KeptScores:
    """Scores in the order of chunks: for each a sha256 of its pairs and scores, and the scores.

    So a record that was not written to its end, or belongs to other pairs because the input was
    changed, is recognized; it is dropped with all that follow.

    Args:
        file: opened for reading and appending, unbuffered.
        name: its path, for errors.
    """

    def __init__(self, file: IO[bytes], name: Path) -> None:
        self._file = file
        self._name = name
        self._place = 0
        self._file.seek(0)

    def take(self, pairs: Sequence[tuple[str, str]]) -> Scores | None:
        """The scores of the next chunk's pairs; None if they are not kept."""
        record = self._file.read(_DIGEST + 8 * len(pairs))
        scores = record[_DIGEST:]
        if len(scores) != 8 * len(pairs) or _digest(pairs, scores) != record[:_DIGEST]:
            self._file.truncate(self._place)
            return None
        self._place += len(record)
        return np.frombuffer(scores, "<f8")

    def add(self, pairs: Sequence[tuple[str, str]], scores: Scores) -> None:
        """Keep the scores of the chunk that `take` did not find.

        Raises:
            OSError: the disk is full.
        """
        content = scores.astype("<f8").tobytes()
        record = _digest(pairs, content) + content
        append(self._file, record, self._name)
        self._place = self._file.seek(0, os.SEEK_END)


def _digest(pairs: Sequence[tuple[str, str]], scores: bytes) -> bytes:
    return hashlib.sha256(json.dumps(pairs).encode() + scores).digest()
