"""The pairs every conversion is proven with, and the ones it may look at beforehand."""

from __future__ import annotations

import json
from importlib import resources

_LONGEST = 900
"""Characters of a long probe times a growing factor: with the models' limits, 3 to 512 tokens."""


def probe_pairs() -> list[tuple[str, str]]:
    """Pairs of varied length, language and relevance: 44, from an empty document to a long one."""
    topics = _topics()
    documents = [text for topic in topics for text in (topic["answer"], topic["related"])]
    pairs = []
    for i, topic in enumerate(topics):
        query = topic["query"]
        unrelated = topics[(i + 3) % len(topics)]["answer"]
        rotated = " ".join(documents[2 * i :] + documents[: 2 * i])
        long = rotated[: _LONGEST * (i % 4 + 1)]
        pairs += [(query, text) for text in (topic["answer"], topic["related"], unrelated, long)]
    query = topics[0]["query"]
    return [*pairs, (query, ""), (query, "Mars"), (query, "🪐 mars!!"), ("?", topics[2]["answer"])]


def calibration_pairs() -> list[tuple[str, str]]:
    """Other pairings of the same topics: what is looked at must not be what proves."""
    topics = _topics()
    return [
        (topic["query"], topics[(i + shift) % len(topics)][kind])
        for i, topic in enumerate(topics)
        for shift, kind in ((1, "related"), (2, "answer"), (4, "related"))
    ]


def _topics() -> list[dict[str, str]]:
    text = resources.files(__package__).joinpath("probes.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]
