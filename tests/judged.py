"""Small judged collections, written in the layouts that users have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qrank.quality.collection import Collection

WORDS = ("mars", "bread", "planet", "river", "sugar", "light", "plant", "honey", "stone", "paper")


@dataclass
class Data:
    """A collection to write; by default twelve documents and five queries, one of them unjudged."""

    documents: dict[str, str] = field(
        default_factory=lambda: {
            f"d{i}": " ".join(
                [WORDS[i % 10], WORDS[(3 * i + 1) % 10], WORDS[(i * i) % 10]] * (i + 1)
            )
            for i in range(12)
        }
    )
    queries: dict[str, str] = field(
        default_factory=lambda: (
            {f"q{i}": f"{WORDS[i]} {WORDS[i + 4]}" for i in range(4)} | {"unjudged": "mars"}
        )
    )
    qrels: list[str] = field(
        default_factory=lambda: ["q0 0 d0 1", "q0 0 d4 2", "q1 0 d1 1", "q2 0 d9 0", "q3 0 d3 1"]
    )

    def write(self, folder: Path) -> Path:
        """Write the plain layout."""
        self._texts(folder / "documents.jsonl", "id", self.documents)
        self._texts(folder / "queries.jsonl", "id", self.queries)
        (folder / "qrels.trec").write_text("".join(f"{x}\n" for x in self.qrels), "utf-8")
        return folder

    def write_beir(self, folder: Path) -> Path:
        """Write the layout of BEIR's archives, with titles next to the texts."""
        split = {d: text.partition(" ") for d, text in self.documents.items()}
        lines = [
            {"_id": d, "title": title, "text": text, "metadata": {}}
            for d, (title, _, text) in split.items()
        ]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")
        self._texts(folder / "queries.jsonl", "_id", self.queries)
        (folder / "qrels").mkdir()
        rows = ["query-id\tcorpus-id\tscore"]
        rows += ["\t".join((q, d, r)) for q, _, d, r in (line.split() for line in self.qrels)]
        (folder / "qrels/test.tsv").write_text("".join(f"{x}\n" for x in rows), "utf-8")
        return folder

    @staticmethod
    def _texts(path: Path, key: str, texts: dict[str, str]) -> None:
        lines = [json.dumps({key: name, "text": text}) + "\n" for name, text in texts.items()]
        path.write_text("".join(lines), "utf-8")


@contextmanager
def opened(folder: Path) -> Iterator[Collection]:
    collection = Collection.read(folder)
    try:
        yield collection
    finally:
        collection.close()
