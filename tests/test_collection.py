"""Collections as they are read, and what BM25 makes of next to nothing."""

from pathlib import Path

import pytest
from judged import Data, opened

from qrank.collection import Files
from qrank.errors import InputError


def test_equal_judgements_may_repeat(tmp_path: Path) -> None:
    data = Data().write(tmp_path)
    with (data / "qrels.trec").open("a", encoding="utf-8") as file:
        file.write("q0 0 d0 1\n")
    with opened(data) as collection:
        assert collection.qrels["q0"] == {"d0": 1, "d4": 2}
        assert list(collection.documents) == [f"d{i}" for i in range(12)]
        with pytest.raises(KeyError):
            collection.documents["d99"]


@pytest.mark.parametrize("texts", [{}, {"d": ""}, {"d": "the of"}, {"d": "mars"}])
def test_bm25_of_next_to_nothing(tmp_path: Path, texts: dict[str, str]) -> None:
    """Documents without a word, or that share none with the query, are no candidates."""
    data = Data(documents={"d0": "!", **texts}, queries={"q0": "mars"}, qrels=["q0 0 d0 1"])
    with opened(data.write(tmp_path)) as collection:
        assert [list(found) for found in collection.bm25().values()] == [
            ["d"] if texts == {"d": "mars"} else []
        ]


def test_files_are_those_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no documents: .*nothing\.jsonl is no file"):
        Files.find(documents=tmp_path / "nothing.jsonl")
