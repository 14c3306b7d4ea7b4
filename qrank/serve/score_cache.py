"""Logits of pairs that were scored before, the most recently used ones, of all models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from qrank.bundle.sequences import Logits
from qrank.engine import Engine
from qrank.scoring.inputs import ModelInput


class ScoreCache:
    """A bounded cache. It stores digests of token ids, and no text."""

    def __init__(self, size: int) -> None:
        """Make an empty cache for `size` model inputs: pairs, or parts of long documents."""
        self._size = size
        self._logits: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._logits)

    def of(self, engine: Engine) -> ModelScores:
        """The part of the cache for a model as this engine runs it."""
        running = (engine.manifest.digest, engine.target.key, engine.compute_dtype)
        return ModelScores(self, repr(running).encode())

    def get(self, key: bytes) -> float:
        """The logit of a key; NaN if it is unknown."""
        if key not in self._logits:
            return float("nan")
        self._logits.move_to_end(key)
        return self._logits[key]

    def put(self, key: bytes, logit: float) -> None:
        """Store a logit; the one that was not used for longest gives way."""
        self._logits[key] = logit
        self._logits.move_to_end(key)
        if len(self._logits) > self._size:
            self._logits.popitem(last=False)


class ModelScores:
    """The part of a `ScoreCache` for one model."""

    def __init__(self, cache: ScoreCache, running: bytes) -> None:
        self._cache = cache
        self._running = running

    def recall(self, inputs: Sequence[ModelInput]) -> Logits:
        """The known logits of inputs, and NaN for the others; shape [n]."""
        return np.array([self._cache.get(self._key(each)) for each in inputs], np.float32)

    def remember(self, inputs: Iterable[ModelInput], logits: Logits) -> None:
        """Store the logits of inputs."""
        for each, logit in zip(inputs, logits.tolist(), strict=True):
            self._cache.put(self._key(each), logit)

    def _key(self, found: ModelInput) -> bytes:
        """All that a logit depends on; query, instruction and document are in the token ids."""
        segments = b"" if found.segments is None else found.segments.tobytes()
        digest = blake2b(self._running, digest_size=16)
        for part in (found.prefix.tobytes(), found.ids.tobytes(), segments):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        return digest.digest()
