"""Reading of collections, compared with the readers of BEIR and ir_measures; and BM25."""

import gzip
import io
import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import ir_measures
import pytest
from commands import qrank_
from hypothesis import given
from hypothesis import strategies as st
from judged import Data, opened

from qrank.errors import InputError
from qrank.quality.collection import Collection, Files
from qrank.quality.metrics import measure
from qrank.quality.words import words


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
    """Documents that have no words, or share none with the query, are not candidates."""
    data = Data(documents={"d0": "!", **texts}, queries={"q0": "mars"}, qrels=["q0 0 d0 1"])
    with opened(data.write(tmp_path)) as collection:
        assert [list(found) for found in collection.bm25().values()] == [
            ["d"] if texts == {"d": "mars"} else []
        ]


def test_files_are_those_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no documents: .*nothing\.jsonl is no file"):
        Files.find(documents=tmp_path / "nothing.jsonl")


def test_a_folders_files_may_be_compressed(tmp_path: Path) -> None:
    """Some collections are published this way: corpus.jsonl.gz."""
    data = Data().write_beir(tmp_path)
    with opened(data) as collection:
        expected = collection.bm25()
    for name in ("corpus.jsonl", "qrels/test.tsv"):
        (data / f"{name}.gz").write_bytes(gzip.compress((data / name).read_bytes()))
        (data / name).unlink()
    with opened(data) as collection:
        assert collection.bm25() == expected


TEXTS = {
    "Chinese": ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", "明月光", "白日依山尽"),
    "Chinese, one letter": ("疑是地上霜", "霜", "白日依山尽"),
    "Japanese": ("吾輩は猫である。名前はまだ無い。", "猫の名前", "むかしむかし"),
    "Japanese, half width": ("コンピュータの歴史", "ｺﾝﾋﾟｭｰﾀ", "むかしむかし"),
    "Korean": ("대한민국의 수도는 서울이다", "서울", "부산"),
    "Thai": ("ประเทศไทยมีเมืองหลวงชื่อกรุงเทพ", "เมืองหลวง", "ขนมปัง"),
    "Khmer": ("ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា", "រាជធានី", "នំ"),
    "Hindi": ("भारत की राजधानी दिल्ली है", "दिल्ली", "रोटी"),
    "Arabic": ("المريخ كوكب أحمر", "كوكب", "خبز"),
    "full width": ("ＭＡＲＳ　ｉｓ　ｒｅｄ", "mars", "bread"),
    "decomposed": ("cafe\u0301 au lait", "caf\u00e9", "cafe"),
}


@pytest.mark.parametrize("script", TEXTS)
def test_bm25_finds_words_in_every_script(tmp_path: Path, script: str) -> None:
    text, query, other = TEXTS[script]
    data = Data(documents={"d0": other, "d1": text}, queries={"q0": query}, qrels=["q0 0 d1 1"])
    with opened(data.write(tmp_path)) as collection:
        assert next(iter(collection.bm25()["q0"])) == "d1"


# Diacritics are handled differently on purpose: exclude letters that are or become marked ones.
@given(st.text(st.characters(max_codepoint=0x2AF, exclude_characters="¨¯´¸˘˙˚˛˜˝İ")))
def test_words_of_scripts_with_spaces_are_those_of_bm25s(text: str) -> None:
    text = unicodedata.normalize("NFKC", text)
    assert [words(text)] == bm25s.tokenize(
        text, stopwords=[], return_ids=False, show_progress=False
    )


def test_a_first_stage_that_finds_nothing_is_an_error(bundle: Path, tmp_path: Path) -> None:
    data = Data(queries={"q0": "!", "q1": "absent"}, qrels=["q0 0 d0 1", "q1 0 d1 1"])
    command = ("eval", bundle, "--data", data.write(tmp_path), "--backend", "fakes:length")
    result = qrank_(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no candidate for any of the 2 queries: BM25 finds nothing to rerank" in result.stderr


def test_queries_without_candidates_are_told(bundle: Path, tmp_path: Path) -> None:
    data = Data(queries={"q0": "mars", "q1": "!"}, qrels=["q0 0 d0 1", "q1 0 d1 1"])
    command = ("eval", bundle, "--data", data.write(tmp_path), "--backend", "fakes:length")
    result = qrank_(*command)
    assert result.exit_code == 0
    assert "BM25 finds no candidate for 1 of 2 queries; they count as 0" in result.stderr


NAMES = ("queries.jsonl", "documents.jsonl", "qrels.trec")


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_judgements_of_what_is_not_there_are_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A judged document that is missing still counts in the ideal gain, as in trec_eval."""
    data = Data().write(tmp_path)
    lines = [*Data().qrels, "q0 0 lost 2", "q1 0 lost 1", "q9 0 d1 1", "q8 0 d1 1"]
    (data / "qrels.trec").write_text("\n".join(lines), "utf-8")
    with opened(data) as collection:
        queries, documents, qrels = (data / f"{name}" for name in NAMES)
        assert told(caplog).splitlines() == [
            f"judged in {qrels}, not in {queries}, left out: 2 of 6 queries",
            f"in {queries}, not judged, left out: 1 of 5 queries",
            f"judged in {qrels}, not in {documents}, counted as not found: 1 of 6 documents",
        ]
        assert list(collection.judged()["q0"]) == ["d0", "d4"]
        found = collection.bm25()
        ours = measure(collection.qrels, {query: list(names) for query, names in found.items()})
    theirs = ir_measures.calc_aggregate(
        [ir_measures.parse_measure("nDCG@10")],
        ir_measures.read_trec_qrels(io.StringIO("\n".join(lines[:-2]) + "\n")),
        {query: {name: -place for place, name in enumerate(f)} for query, f in found.items()},
    )
    assert ours["nDCG@10"].mean() == pytest.approx(next(iter(theirs.values())))


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (["x 0 d0 1", "y 0 d1 1"], r"all 2 queries; these files do not belong together"),
        (["q0 0 x 1", "q1 0 y 1"], r"all 2 documents; these files do not belong together"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, qrels: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Collection.read(Data(qrels=qrels).write(tmp_path))


def in_beir(text: str) -> dict[str, dict[str, int]]:
    """Parse a file like BEIR's loader, which skips the first line without looking at it."""
    import csv

    found: dict[str, dict[str, int]] = {}
    reader = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_MINIMAL)
    next(reader)
    for query, document, score in reader:
        found.setdefault(query, {})[document] = int(score)
    return found


def in_trec(text: str) -> dict[str, dict[str, int]]:
    """Parse a file with ir_measures' reader."""
    found: dict[str, dict[str, int]] = {}
    for item in ir_measures.read_trec_qrels(io.StringIO(text)):
        found.setdefault(item.query_id, {})[item.doc_id] = item.relevance
    return found


PLAIN = {"q0": {"d0": 1, "d4": 2}, "q1": {"d1": 0}}
ODD_QRELS: dict[str, tuple[str, Callable[[str], dict[str, dict[str, int]]] | None]] = {
    "trec": ("q0 0 d0 1\nq0 0 d4 2\nq1 0 d1 0\n", in_trec),
    "blanks and tabs": (" q0\t0   d0 1\n\n   \nq0 Q0 d4\t2 \n\tq1 0 d1 0", in_trec),
    "beir": ("query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td4\t2\nq1\td1\t0\n", in_beir),
    "beir, quoted": ('query-id\tcorpus-id\tscore\n"q0"\td0\t1\nq0\t"d4"\t2\nq1\td1\t0\n', in_beir),
    "grades with a point": ("q0 0 d0 1.0\nq0 0 d4 2.\nq1 0 d1 0.00\n", None),
    "names, four columns": ("query_id iter doc_id rel\nq0 0 d0 1\nq0 0 d4 2\nq1 0 d1 0\n", None),
    "names below a blank line": ("\n\nqid\tdocid\trel\nq0\td0\t1\nq0\td4\t2\nq1\td1\t0\n", None),
    "names and blanks": ("query-id corpus-id score\nq0 d0 1\nq0 d4 2\nq1 d1 0\n", None),
}


@pytest.mark.parametrize("kind", ODD_QRELS)
def test_judgements_are_what_the_fields_readers_take_them_for(tmp_path: Path, kind: str) -> None:
    text, reader = ODD_QRELS[kind]
    data = Data().write(tmp_path)
    (data / "qrels.trec").write_text(text, "utf-8")
    with opened(data) as collection:
        assert collection.qrels == PLAIN
    if reader is not None:
        assert reader(text) == PLAIN


def test_ids_of_a_table_may_hold_blanks(tmp_path: Path) -> None:
    data = Data(documents={"d 0": "mars", "d1": "b"}, queries={"q 0": "mars"}).write(tmp_path)
    text = "query-id\tcorpus-id\tscore\nq 0\td 0\t1\n"
    (data / "qrels.trec").write_text(text, "utf-8")
    with opened(data) as collection:
        assert collection.qrels == in_beir(text) == {"q 0": {"d 0": 1}}


@pytest.mark.parametrize(
    "line",
    [
        "q0 0 d0 1.5",
        "q0 0 d0 high",
        "q0 0 d0 nan",
        "q0 0 d0 99999999999",
        "q 0 d0 high",
        "q0 0 d0",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_line_that_is_no_judgement_is_never_taken_for_names(
    tmp_path: Path, line: str, first: bool
) -> None:
    data = Data().write(tmp_path)
    others = Data().qrels
    (data / "qrels.trec").write_text("\n".join([line, *others] if first else [*others, line]))
    with pytest.raises(InputError, match=f"line {1 if first else 6}: expected query, 0, document"):
        Collection.read(data)


def argument(key: str = "_id") -> dict[str, Any]:
    """Two arguments as documents, one of which is also the query."""
    return {
        "documents.jsonl": [
            {key: "1", "title": "space", "text": "Mars  is red"},
            {key: "2", "title": "", "text": "mars is not red"},
        ],
        "queries.jsonl": [{key: "1", "text": "Mars is red"}],
    }


def write(folder: Path, files: dict[str, Any], qrels: str = "1 0 2 1\n") -> Path:
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    (folder / "qrels.trec").write_text(qrels, "utf-8")
    return folder


def test_a_query_that_is_a_document_is_no_candidate_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both in BM25's list and in a run; the next document takes its place within the depth."""
    folder = write(tmp_path, argument())
    (folder / "run").write_text("1 Q0 1 1 2 x\n1 Q0 2 2 1 x\n", "utf-8")
    with opened(folder) as collection:
        assert list(collection.bm25(depth=1)["1"]) == ["2"]
        assert list(collection.run(folder / "run", depth=1)["1"]) == ["2"]
    assert told(caplog).count("(same id and text), left out there: 1 of 1 queries") == 2


def test_the_same_number_alone_makes_no_query_a_document(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With plain numbers as the ids of queries and documents, as in Cranfield."""
    files = argument()
    files["queries.jsonl"] = [{"_id": "1", "text": "is mars red"}]
    with opened(write(tmp_path, files)) as collection:
        assert set(collection.bm25()["1"]) == {"1", "2"}
    assert told(caplog) == ""


def test_lines_of_a_run_that_are_not_judged_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Data().write(tmp_path)
    (data / "run").write_text("q0 Q0 d1 1 1 x\nunjudged Q0 d1 1 1 x\nq9 Q0 d1 1 1 x\n", "utf-8")
    with opened(data) as collection, caplog.at_level(logging.WARNING):
        collection.run(data / "run")
    assert f"in {data / 'run'}, not judged, left out: 2 of 3 queries" in told(caplog)


# Record as a tool writes it -> text that is read from it.
RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "BEIR": ({"_id": "d", "title": "Mars", "text": "Mars is red"}, "Mars Mars is red"),
    "BEIR, no title": ({"_id": "d", "title": "", "text": "is red", "metadata": {}}, "is red"),
    "BEIR, title alone": ({"_id": "d", "title": "Mars", "text": ""}, "Mars"),
    "id and title": ({"id": "d", "title": "Mars", "text": "is red"}, "Mars is red"),
    "id, title alone": ({"id": "d", "title": "The red planet", "text": ""}, "The red planet"),
    "title in the text": ({"id": "d", "title": "Mars", "text": "Mars is red"}, "Mars is red"),
    "no title": ({"id": "d", "title": None, "text": "is red"}, "is red"),
    "Anserini": ({"id": "d", "contents": "is red"}, "is red"),
    "Anserini, empty text": ({"id": "d", "text": "", "contents": "is red"}, "is red"),
    "MS MARCO v2": ({"pid": "d", "passage": "is red", "spans": "", "docid": "x"}, "is red"),
    "MS MARCO v2.1": ({"docid": "d", "title": "Mars", "segment": "is red"}, "Mars is red"),
    "MS MARCO documents": ({"docid": "d", "title": "Mars", "body": "is red"}, "Mars is red"),
    "Tevatron": ({"docid": "d", "title": "Mars", "text": "is red"}, "Mars is red"),
    "Elasticsearch": ({"_id": "d", "title": "Mars", "content": "is red"}, "Mars is red"),
    "LangChain": ({"id": "d", "page_content": "is red", "metadata": {"text": "x"}}, "is red"),
}


@pytest.mark.parametrize("tool", RECORDS)
def test_records_of_usual_tools_are_read_with_their_titles(
    bundle: Path, tmp_path: Path, tool: str
) -> None:
    """In every command that reads records."""
    record, text = RECORDS[tool]
    folder = write(
        tmp_path, {"documents.jsonl": [record], "queries.jsonl": [{"qid": 1, "query": "q"}]}
    )
    with opened(write(folder, {}, "1 0 d 1\n")) as collection:
        assert collection.documents["d"] == text
        assert collection.queries == {"1": "q"}
    result = qrank_(
        *("score", "-m", bundle, "--backend", "fakes:length", "-q", "q", "--jsonl"),
        *("-f", "trec"),
        stdin=json.dumps(record),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("q Q0 d 1 ")
    shown = qrank_(
        *("score", "-m", bundle, "--backend", "fakes:length", "-q", "q", "--jsonl"),
        stdin=json.dumps(record),
    )
    assert shown.stdout.endswith(f"\t{text}\n")


def test_fields_that_are_not_known_are_named(tmp_path: Path) -> None:
    files = argument()
    files["documents.jsonl"] = [{"id": "1", "abstract": "Mars", "url": "x"}]
    with pytest.raises(
        InputError, match=r'line 1: .*"contents".*found the fields "id", "abstract"'
    ):
        Collection.read(write(tmp_path, files))
    files["documents.jsonl"] = [{"key": "1", "text": "Mars"}]
    with pytest.raises(InputError, match=r'line 1: .*"docid".*found the fields "key", "text"'):
        Collection.read(write(tmp_path, files))
