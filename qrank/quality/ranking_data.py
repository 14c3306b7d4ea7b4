"""The user's own queries and documents to prove a conversion on, without judgements."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from qrank.bundle.agreement import TOP, RankingData
from qrank.errors import InputError
from qrank.quality.bm25 import bm25
from qrank.quality.records import Texts

CANDIDATES = 24
"""Documents that a query ranks: as many as qrank's own queries."""


def read_ranking_data(queries: Path, documents: Path) -> RankingData:
    """Read queries and documents; BM25 finds the documents that each query ranks.

    Queries are taken in the file's order; those for which BM25 finds no more than ten are left out.

    Args:
        queries: JSONL with id and text: see `Texts`.
        documents: JSONL with id and text.

    Raises:
        InputError: a file cannot be parsed (the message names the line), or BM25 finds more than
            ten documents for no query.
        MissingExtraError: bm25s is not installed.
    """
    with closing(Texts(queries, "query")) as asked, closing(Texts(documents, "document")) as texts:
        run = bm25({query: asked[query] for query in asked}, texts, CANDIDATES)
        ranked = [
            (asked[query], [texts[document] for document in found])
            for query, found in run.items()
            if len(found) > TOP
        ]
        if not ranked:
            raise InputError(
                f"BM25 finds more than {TOP} documents of {texts.name} for none of the "
                f"{len(asked)} queries of {asked.name}; a ranking needs more: give more documents, "
                "or longer queries"
            )
    return RankingData(queries.name, ranked, (queries, documents))
