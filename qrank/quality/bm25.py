"""BM25 as a first stage: the best documents for each query."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np

from qrank.quality.records import Texts
from qrank.quality.words import words
from qrank.system.extras import need

Run = dict[str, dict[str, float]]
"""Query id -> document id -> the first stage's score, best first."""


def bm25(queries: Mapping[str, str], documents: Texts, depth: int) -> Run:
    """BM25's best documents for each query, without those that share no word with it.

    Uses bm25s with its default parameters, on `words` without English stop words.

    Args:
        queries: texts by id.
        documents: all documents.
        depth: maximum number of documents per query.
    """
    bm25s = need("bm25s")
    stop = frozenset(need("bm25s.stopwords").STOPWORDS_EN)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG
    names = list(documents)
    if not names or not queries:
        return {}

    def tokens(texts: Iterable[str]) -> list[list[str]]:
        return [[word for word in words(text) if word not in stop] for text in texts]

    corpus = tokens(documents[name] for name in names)
    if not any(corpus):
        return {query: {} for query in queries}
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    found, scores = index.retrieve(
        tokens(queries.values()), k=min(depth, len(names)), show_progress=False
    )
    return {
        query: {names[place]: float(score) for place, score in zip(*best, strict=True) if score}
        for query, *best in zip(queries, found, np.asarray(scores), strict=True)
    }
