"""A test collection: queries, documents, judgements, and the candidates a first stage finds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from qrank.errors import InputError
from qrank.quality.bm25 import Run, bm25
from qrank.quality.fusion import fuse
from qrank.quality.records import Texts, judgements, run_lines
from qrank.system.textfiles import STANDARD_INPUT, SUFFIXES, TextFile

log = logging.getLogger("qrank")

LAYOUTS = (
    {"documents": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"},
    {"documents": "documents.jsonl", "queries": "queries.jsonl", "qrels": "qrels.trec"},
)
"""File names of a collection in a folder: BEIR's layout, and a plain one."""


@dataclass(frozen=True)
class Files:
    """Paths of a collection's files."""

    queries: Path
    documents: Path
    qrels: Path

    @classmethod
    def find(cls, folder: Path | None = None, **named: Path | None) -> Files:
        """The files of a folder in one of `LAYOUTS`; a file that is named replaces the folder's.

        Raises:
            InputError: a file is neither named nor in the folder, or does not exist.
        """
        files = {kind: path for kind, path in named.items() if path is not None}
        if folder is not None:
            layout = next((x for x in LAYOUTS if _there(folder / x["documents"])), None)
            if layout is None:
                raise InputError(
                    f"{folder} holds no collection: expected {' or '.join(map(_listed, LAYOUTS))}, "
                    f"maybe compressed ({', '.join(SUFFIXES)})"
                )
            found = {kind: folder / name for kind, name in layout.items()}
            files = {**{kind: _there(path) or path for kind, path in found.items()}, **files}
        for kind in ("documents", "queries", "qrels"):
            if kind not in files:
                raise InputError(f"no {kind}: give --{kind} FILE, or all by --data FOLDER")
            path = files[kind]
            # A pipe is not a regular file, but can be read.
            if path != STANDARD_INPUT and (path.is_dir() or not path.exists()):
                raise InputError(f"no {kind}: {path} is no file; give --{kind} FILE")
        return cls(**files)


def _there(path: Path) -> Path | None:
    """The path of a file or of its compressed form; None if neither exists."""
    names = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
    return next((name for name in names if name.is_file()), None)


def _listed(layout: dict[str, str]) -> str:
    return ", ".join(layout.values())


class Collection:
    """The judged queries, their judgements, and all documents.

    Documents stay on disk. A warning counts the ids that judgements name and the other files lack:
    such a document still counts as one to be found, as in trec_eval; such a query is left out, and
    so are queries without judgements.

    Attributes:
        name: the name of the documents' folder, or "a pipe".
        queries: query id -> text, in the file's order.
        documents: texts by id.
        qrels: query id -> document id -> relevance.

    Raises:
        InputError: a file cannot be parsed (the message names the line); or no judged query or
            no judged document is in the other files.
    """

    def __init__(self, files: Files) -> None:
        lies = files.documents
        self.name = lies.absolute().parent.name if lies.is_file() else "a pipe"
        with ExitStack() as opened:
            self.documents = opened.enter_context(closing(Texts(lies, "document")))
            with closing(Texts(files.queries, "query")) as asked, TextFile(files.qrels) as file:
                qrels = _judgements(file)
                self.queries = {query: asked[query] for query in asked if query in qrels}
                self.qrels = {query: qrels[query] for query in self.queries}
                self._tell_what_lacks(asked, file.name, len(qrels))
            self._opened = opened.pop_all()

    def _tell_what_lacks(self, asked: Texts, qrels: str, judged: int) -> None:
        """Warn about ids that one of the files names and another lacks.

        Args:
            asked: all queries.
            qrels: name of the judgements' file.
            judged: number of queries in that file.
        """
        known = len(self.queries)
        _tell(
            f"judged in {qrels}, not in {asked.name}, left out", judged - known, judged, "queries"
        )
        _tell(f"in {asked.name}, not judged, left out", len(asked) - known, len(asked), "queries")
        named = {document for found in self.qrels.values() for document in found}
        lacking = sum(document not in self.documents for document in named)
        what = f"judged in {qrels}, not in {self.documents.name}, counted as not found"
        _tell(what, lacking, len(named), "documents")

    @classmethod
    def read(cls, folder: Path) -> Collection:
        """The collection in a folder of one of `LAYOUTS`."""
        return cls(Files.find(folder))

    def close(self) -> None:
        """Close the documents' file."""
        self._opened.close()

    def bm25(self, depth: int = 100, max_queries: int | None = None) -> Run:
        """BM25's best documents for each query, without those that share no word with it.

        See `qrank.quality.bm25`. A query that is also a document is not a candidate for itself:
        see `_itself`.

        Args:
            depth: maximum number of documents per query.
            max_queries: use only the first `max_queries` queries. None: all.
        """
        queries = dict(list(self.queries.items())[:max_queries])
        itself = self._itself(queries)
        run = bm25(queries, self.documents, depth + bool(itself))
        return _without(run, itself, depth)

    def run(self, *paths: Path, depth: int = 100, max_queries: int | None = None) -> Run:
        """The best documents of a TREC run's judged queries, by score; ties keep the run's order.

        Several runs are fused: see `qrank.quality.fusion`. A query that is also a document is not a
        candidate for itself: see `_itself`.

        Args:
            paths: paths of the runs.
            depth: maximum number of documents per query.
            max_queries: use only this many queries, in the order of the queries' file. None: all.

        Raises:
            InputError: a line cannot be parsed, repeats a document, or names one that the documents
                file lacks (the message names the line); or no query of the run is judged.
        """
        runs = [self._ranked(path) for path in paths]
        named = {query for run in runs for query in run}
        queries = [query for query in self.queries if query in named][:max_queries]
        if len(runs) == 1:
            ranked = {query: runs[0][query] for query in queries}
        else:
            ranked = {query: fuse(run.get(query, ()) for run in runs) for query in queries}
        return _without(ranked, self._itself(queries), depth)

    def _ranked(self, path: Path) -> Run:
        """The judged queries of a TREC run, their documents by score."""
        found: Run = {}
        others = set()
        with TextFile(path) as file:
            for line in run_lines(file):
                if line.query not in self.queries:
                    others.add(line.query)
                    continue
                score = line.number_of_score()
                if line.document not in self.documents:
                    raise InputError(f"{line.where}: the documents file lacks {line.document!r}")
                if line.document in found.setdefault(line.query, {}):
                    raise InputError(line.repeated())
                found[line.query][line.document] = score
            if not found:
                raise InputError(
                    f"{file.name} names no query that is judged; is it of this collection?"
                )
            what = f"in {file.name}, not judged, left out"
            _tell(what, len(others), len(others) + len(found), "queries")
        return {
            query: dict(sorted(scores.items(), key=lambda item: -item[1]))
            for query, scores in found.items()
        }

    def judged(self, max_queries: int | None = None) -> Run:
        """The judged documents of each query as candidates without a first stage: all score 0."""
        return {
            query: {name: 0.0 for name in self.qrels[query] if name in self.documents}
            for query in list(self.queries)[:max_queries]
        }

    def _itself(self, queries: Iterable[str]) -> set[str]:
        """The queries that are also documents, with the same id and text.

        Collections of arguments (ArguAna) and duplicate questions (Quora) have them, and BEIR
        evaluates without them. BEIR compares only ids, but if queries and documents are simply
        numbered, equal ids mean nothing.
        """
        return {
            query
            for query in queries
            if query in self.documents and _holds(self.documents[query], self.queries[query])
        }


def _without(run: Run, itself: Set[str], depth: int) -> Run:
    """The best candidates of every query, without the query itself."""
    found_itself = sum(query in found for query, found in run.items() if query in itself)
    if found_itself:
        log.warning(
            "among its own candidates (same id and text), left out there: %d of %d queries",
            found_itself,
            len(run),
        )
    kept: Run = {}
    for query, found in run.items():
        names = [name for name in found if not (name == query and query in itself)]
        kept[query] = {name: found[name] for name in names[:depth]}
    return kept


def _holds(document: str, query: str) -> bool:
    """Whether a document's text ends with a query's text; a title may come first."""
    return f" {' '.join(document.split())}".endswith(f" {' '.join(query.split())}")


def _tell(what: str, count: int, of: int, kind: str) -> None:
    """Warn about a count, if it is not 0.

    Raises:
        InputError: the count covers all of them.
    """
    if count == of:
        raise InputError(f"{what}: all {of} {kind}; these files do not belong together")
    if count:
        log.warning("%s: %d of %d %s", what, count, of, kind)


def _judgements(file: TextFile) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance.

    Raises:
        InputError: a line cannot be parsed or contradicts another, or there are no judgements.
    """
    qrels: dict[str, dict[str, int]] = {}
    for item in judgements(file):
        known = qrels.setdefault(item.query, {}).setdefault(item.document, item.relevance)
        if known != item.relevance:
            raise InputError(
                f"{file.name}, line {item.number}: document {item.document!r} is judged "
                f"{item.relevance} for query {item.query!r}, and {known} above"
            )
    if not qrels:
        raise InputError(f"{file.name} holds no judgement")
    return qrels
