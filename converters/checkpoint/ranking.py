"""The queries and passages on which every conversion proves that a variant still ranks."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from typing import Any

from qrank.bundle.agreement import RankingData

DATA = "qrank's own"
"""Name of these queries and passages in a manifest."""

PASSAGES = 24
"""Number of passages that each query ranks."""


def ranking_data() -> RankingData:
    """qrank's own queries, each with 24 passages.

    A query's passages are its one to three relevant ones, its hard negatives, and passages of the
    next topics: those of its language first, then English ones. Any first few queries differ in
    language and domain.
    """
    text = resources.files(__package__).joinpath("ranking.jsonl").read_text("utf-8")
    topics = [json.loads(line) for line in text.splitlines()]
    queries = [(topic["query"], _passages(topics, place)) for place, topic in enumerate(topics)]
    return RankingData(DATA, queries)


def _passages(topics: list[dict[str, Any]], place: int) -> list[str]:
    own = topics[place]
    others = topics[place + 1 :] + topics[:place]
    order = (own["language"], "en")
    others.sort(key=lambda topic: [*order, topic["language"]].index(topic["language"]))
    found = [text for topic in (own, *others) for text in topic["relevant"] + topic["hard"]]
    # In an order that says nothing about relevance: ties keep it.
    return sorted(found[:PASSAGES], key=lambda text: hashlib.sha256(text.encode()).digest())
