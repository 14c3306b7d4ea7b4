"""A test collection: queries, documents, judgements, and the candidates a first stage finds."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrank.errors import InputError
from qrank.extras import need
from qrank.records import Texts, judgements, run_lines

Run = dict[str, dict[str, float]]
"""Query id -> document id -> the first stage's score, best first."""

LAYOUTS = (
    {"documents": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"},
    {"documents": "documents.jsonl", "queries": "queries.jsonl", "qrels": "qrels.trec"},
)
"""What a collection's files are called in a folder: BEIR's layout, and a plain one."""


@dataclass(frozen=True)
class Files:
    """Where a collection lies."""

    queries: Path
    documents: Path
    qrels: Path

    @classmethod
    def find(cls, folder: Path | None = None, **named: Path | None) -> Files:
        """The files of a folder in one of `LAYOUTS`; one that is named takes its place.

        Raises:
            InputError: one is neither named nor in the folder.
        """
        files = {kind: path for kind, path in named.items() if path is not None}
        if folder is not None:
            layout = next((x for x in LAYOUTS if (folder / x["documents"]).is_file()), None)
            if layout is None:
                raise InputError(
                    f"{folder} holds no collection: expected {' or '.join(map(_listed, LAYOUTS))}"
                )
            files = {**{kind: folder / name for kind, name in layout.items()}, **files}
        for kind in ("documents", "queries", "qrels"):
            if kind not in files:
                raise InputError(f"no {kind}: give --{kind} FILE, or all by --data FOLDER")
            if not files[kind].is_file():
                raise InputError(f"no {kind}: {files[kind]} is no file; give --{kind} FILE")
        return cls(**files)


def _listed(layout: dict[str, str]) -> str:
    return ", ".join(layout.values())


class Collection:
    """The queries that judgements speak of, their judgements, and all documents.

    Documents stay on disk.

    Attributes:
        queries: query id -> text, in the file's order.
        documents: texts by id.
        qrels: query id -> document id -> relevance.

    Raises:
        InputError: a file cannot be parsed, or the judgements name what the others lack; with the
            line.
    """

    def __init__(self, files: Files) -> None:
        self.name = files.documents.parent.name
        with ExitStack() as opened:
            self.documents = opened.enter_context(closing(Texts(files.documents, "document")))
            with closing(Texts(files.queries, "query")) as asked:
                self.qrels = self._judgements(files.qrels, asked)
                self.queries = {query: asked[query] for query in asked if query in self.qrels}
            self._opened = opened.pop_all()

    @classmethod
    def read(cls, folder: Path) -> Collection:
        """The collection in a folder of one of `LAYOUTS`."""
        return cls(Files.find(folder))

    def close(self) -> None:
        """Close the documents' file."""
        self._opened.close()

    def bm25(self, depth: int = 100, limit: int | None = None) -> Run:
        """BM25's best documents of the queries; those that share no word with one are none.

        bm25s with its default parameters, words of two or more letters, English stop words.

        Args:
            depth: documents of a query.
            limit: only the first so many queries.
        """
        bm25s = need("bm25s")
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG
        names = list(self.documents)
        queries = dict(list(self.queries.items())[:limit])
        if not names or not queries:
            return {}

        def tokens(texts: list[str]) -> list[list[str]]:
            found: list[list[str]] = bm25s.tokenize(
                texts, stopwords="en", return_ids=False, show_progress=False
            )
            return found

        corpus = tokens([self.documents[name] for name in names])
        if not any(corpus):
            return {query: {} for query in queries}
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        found, scores = index.retrieve(
            tokens(list(queries.values())), k=min(depth, len(names)), show_progress=False
        )
        return {
            query: {names[place]: float(score) for place, score in zip(*best, strict=True) if score}
            for query, *best in zip(queries, found, np.asarray(scores), strict=True)
        }

    def run(self, path: Path, depth: int = 100, limit: int | None = None) -> Run:
        """The best documents of a TREC run's judged queries, by its scores, equal ones as they lie.

        Args:
            path: of the run.
            depth: documents of a query.
            limit: only the first so many queries, in the order of the queries' file.

        Raises:
            InputError: it cannot be parsed, names what the other files lack, or names no query
                that is judged; with the line.
        """
        found: Run = {}
        for line in run_lines(path):
            where = f"{path}, line {line.number}"
            if line.query not in self.queries:
                continue
            try:
                score = float(line.score)
            except ValueError:
                score = math.nan
            if not math.isfinite(score):
                raise InputError(f"{where}: the score {line.score!r} is no finite number")
            if line.document not in self.documents:
                raise InputError(f"{where}: the documents file lacks {line.document!r}")
            if line.document in found.setdefault(line.query, {}):
                raise InputError(
                    f"{where}: document {line.document!r} stands there twice for query "
                    f"{line.query!r}"
                )
            found[line.query][line.document] = score
        if not found:
            raise InputError(f"{path} names no query that is judged; is it of this collection?")
        queries = [query for query in self.queries if query in found][:limit]
        return {
            query: dict(sorted(found[query].items(), key=lambda item: -item[1])[:depth])
            for query in queries
        }

    def judged(self, limit: int | None = None) -> Run:
        """The judged documents of the queries, as candidates by no first stage: all score 0."""
        return {
            query: dict.fromkeys(self.qrels[query], 0.0) for query in list(self.queries)[:limit]
        }

    def _judgements(self, path: Path, queries: Texts) -> dict[str, dict[str, int]]:
        qrels: dict[str, dict[str, int]] = {}
        for item in judgements(path):
            where = f"{path}, line {item.number}"
            if item.query not in queries:
                raise InputError(f"{where}: the queries file lacks query {item.query!r}")
            if item.document not in self.documents:
                raise InputError(f"{where}: the documents file lacks {item.document!r}")
            known = qrels.setdefault(item.query, {}).setdefault(item.document, item.relevance)
            if known != item.relevance:
                raise InputError(
                    f"{where}: document {item.document!r} is judged {item.relevance} for query "
                    f"{item.query!r}, and {known} above"
                )
        if not qrels:
            raise InputError(f"{path} holds no judgement")
        return qrels
