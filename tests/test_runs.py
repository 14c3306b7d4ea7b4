"""`--run`: whole TREC runs, refused early or reranked one query at a time."""

import gc
import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import contents
from hypothesis import given, settings
from hypothesis import strategies as st

from qrank import Reranker
from qrank.cli import main
from qrank.errors import InputError
from qrank.pairs.plan import Shard
from qrank.quality.rerank_run import RunReranker
from qrank.quality.run_output import rerank_into

Files = tuple[Path, Path, Path]
Write = Callable[..., Files]


@pytest.fixture(scope="module")
def longest_first(bundle: Path) -> Iterator[Reranker]:
    with Reranker(bundle, backend="fakes:length") as reranker:
        yield reranker


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a run, queries and documents; return their paths."""

    def write(
        run: list[str], queries: dict[str, str], documents: dict[str, str], key: str = "id"
    ) -> Files:
        files = (tmp_path / "run.trec", tmp_path / "q.jsonl", tmp_path / "d.jsonl")
        files[0].write_text("".join(f"{line}\n" for line in run), "utf-8")
        for path, texts in zip(files[1:], (queries, documents), strict=True):
            lines = [json.dumps({key: name, "text": text}) + "\n" for name, text in texts.items()]
            path.write_text("".join(lines), "utf-8")
        return files

    return write


QUERIES = {"q1": "a", "q2": "b b", "unused": "c"}
DOCUMENTS = {"d1": "a", "d2": "a a", "d3": "a a a", "unused": "b"}
RUN = ["q2 Q0 d1 1 9 bm25", "q2 Q0 d3 2 8 bm25", "", "q1\tQ0\td2\t1\t9\tbm25", "q1 Q0 d3 2 8 bm25"]


def rerank(files: Files, reranker: Reranker, top_k: int | None = None) -> list[list[str]]:
    run = RunReranker(*files)
    try:
        return list(run.rerank(reranker, top_k=top_k))
    finally:
        run.close()


@pytest.mark.parametrize("key", ["id", "_id"])
def test_order_ranks_and_columns(write: Write, longest_first: Reranker, key: str) -> None:
    files = write(RUN, QUERIES, DOCUMENTS, key)
    assert rerank(files, longest_first) == [
        ["q2 Q0 d3 1 8 qrank", "q2 Q0 d1 2 6 qrank"],
        ["q1 Q0 d3 1 7 qrank", "q1 Q0 d2 2 6 qrank"],
    ]


def test_top_k(write: Write, longest_first: Reranker) -> None:
    files = write(RUN, QUERIES, DOCUMENTS)
    assert [len(lines) for lines in rerank(files, longest_first, top_k=1)] == [1, 1]


def test_ids_may_be_numbers(write: Write, longest_first: Reranker, tmp_path: Path) -> None:
    files = write(["1 Q0 2 1 9 x"], {}, {})
    files[1].write_text('{"id": 1, "text": "a"}\n', "utf-8")
    files[2].write_text('\n{"id": 2, "text": "b"}\n\n', "utf-8")
    assert rerank(files, longest_first) == [["1 Q0 2 1 5 qrank"]]


@pytest.mark.parametrize("run", [[], ["", "  "]])
def test_an_empty_run_is_refused(write: Write, run: list[str]) -> None:
    with pytest.raises(InputError, match=r"run\.trec is empty"):
        RunReranker(*write(run, QUERIES, DOCUMENTS))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (["q1 Q0 d1 1 9 x", "q2 Q0 d1 1 9 x", "", "q1 Q0 d2 2 8 x"], r"line 4: query 'q1' comes"),
        (["q1 Q0 d1 1 9 x", "q1 Q0 d9 2 8 x"], r"line 2: the documents file lacks 'd9'"),
        (["q9 Q0 d1 1 9 x"], r"line 1: the queries file lacks query 'q9'"),
        (["q1 Q0 d1 1 9 x", "q1 Q0 d1 2 8 x"], r"line 2: document 'd1' stands there twice"),
        (["q1 Q0 d1 1 9"], r"line 1: expected 6 columns .*, found 5"),
        (["q1 Q0 d1 1 9 x y"], r"line 1: expected 6 columns .*, found 7"),
        (["", "q1\x01 Q0 d1 1 9 x"], r"line 2: the queries file lacks"),
    ],
)
def test_a_bad_run_is_refused_with_the_line(write: Write, run: list[str], message: str) -> None:
    with pytest.raises(InputError, match=rf"run\.trec, {message}"):
        RunReranker(*write(run, QUERIES, DOCUMENTS))


@pytest.mark.parametrize("file", [1, 2])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "new", "text": 5}', "line 5: .text. of the (query|document) is 5, not a string"),
        ('{"id": "new"}', "line 5: expected"),
        ('{"text": "new"}', "line 5: expected"),
        ('{"id": null, "text": "new"}', "line 5: .id. is null, not a string"),
        ('{"id": true, "text": "new"}', "line 5: .id. is true, not a string"),
        ('{"id": "\\ud800", "text": "new"}', "line 5: .id. is .*half of a surrogate pair"),
        ('{"id": "x", "text": ""' + ', "x": [' * 200 + "]" * 200 + "}", "line 5: expected"),
        ('{"id": "x", "text": "", "x": ' + "[" * 99_999, "line 5: expected .* nested too deeply"),
        ('["id", "text"]', "line 5: expected"),
        ("new", "line 5: expected"),
        ('{"id": "unused", "text": ""}', "line 5: (query|document) 'unused' stands there twice"),
    ],
)
def test_a_bad_text_is_refused_with_the_line(
    write: Write, file: int, line: str, message: str
) -> None:
    files = write(RUN, {**QUERIES, "x": ""}, DOCUMENTS)
    with files[file].open("a", encoding="utf-8") as target:
        target.write(line + "\n")
    with pytest.raises(InputError, match=rf"[qd]\.jsonl, {message}"):
        RunReranker(*files)


def test_a_run_that_is_changed_meanwhile_is_an_error(write: Write, longest_first: Reranker) -> None:
    files = write(RUN, QUERIES, DOCUMENTS)
    run = RunReranker(*files)
    files[0].write_text(files[0].read_text("utf-8").replace("d3", "d9"), "utf-8")
    with pytest.raises(InputError, match="was changed while it was read"):
        list(run.rerank(longest_first))
    run.close()


def test_bytes_that_are_no_text_are_refused_with_the_line(write: Write) -> None:
    files = write(RUN, QUERIES, DOCUMENTS)
    files[0].write_bytes(b"q1 Q0 d1 1 9 x\nq\xff1 Q0 d1 1 9 x\n")
    with pytest.raises(InputError, match=r"run\.trec, line 2"):
        RunReranker(*files)
    files = write(RUN, QUERIES, DOCUMENTS)
    files[2].write_bytes(b'{"id": "d1", "text": "\xff\x1b[31m"}\n')
    with pytest.raises(InputError, match=r"d\.jsonl, line 1") as caught:
        RunReranker(*files)
    assert str(caught.value).isprintable()


def invoke(files: Files, bundle: Path, *more: str) -> tuple[int, str, str]:
    names = ("--run", "--queries", "--documents")
    options = [str(x) for pair in zip(names, files, strict=True) for x in pair]
    command = ["score", "-m", str(bundle), "--backend", "fakes:length", *options, *more]
    result = CliRunner().invoke(main, command)
    return result.exit_code, result.stdout, result.stderr


def test_command_line(write: Write, bundle: Path) -> None:
    code, out, err = invoke(write(RUN, QUERIES, DOCUMENTS), bundle)
    assert (code, err) == (0, "")
    assert [line.split()[2] for line in out.splitlines()] == ["d3", "d1", "d3", "d2"]


def test_nothing_is_written_when_the_last_line_is_bad(write: Write, bundle: Path) -> None:
    code, out, err = invoke(write([*RUN, "q2 Q0 d2 3 7 bm25"], QUERIES, DOCUMENTS), bundle)
    assert (code, out) == (2, "")
    assert err.startswith("qrank: error: ")
    assert "line 6: query 'q2' comes back after another one; sort the run by query first" in err


@pytest.mark.parametrize("more", [["-q", "x"], ["--jsonl"], ["--raw"], ["--format", "json"]])
def test_options_that_do_not_go_with_a_run(write: Write, bundle: Path, more: list[str]) -> None:
    code, out, err = invoke(write(RUN, QUERIES, DOCUMENTS), bundle, *more)
    assert (code, out) == (2, "")
    assert "--run" in err


def test_a_run_goes_with_its_texts(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("", "utf-8")
    result = CliRunner().invoke(main, ["score", "--run", str(tmp_path / "run.trec")])
    assert result.exit_code == 2
    assert "--run goes with --queries and --documents" in result.stderr


@pytest.fixture(scope="module")
def reranked(tmp_path_factory: pytest.TempPathFactory, length: Reranker) -> Iterator[RunReranker]:
    """A run of 9 queries, with queries and documents in Parquet."""
    folder = tmp_path_factory.mktemp("run")
    queries = [{"id": f"q{i}", "text": f"{i} " * i} for i in range(9)]
    documents = [{"docid": i, "text": "a " * i, "vector": [0.5] * i} for i in range(20)]
    for name, rows in (("q", queries), ("d", documents)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    lines = [f"q{i} Q0 {(i * 7 + j) % 20} {j} {-j} bm25\n" for i in range(9) for j in range(5)]
    (folder / "bm25.trec.gz").write_bytes(gzip.compress("".join(lines).encode()))
    run = RunReranker(folder / "bm25.trec.gz", folder / "q.parquet", folder / "d.parquet")
    with closing(run):
        yield run


def test_a_run_is_written_whole_or_in_shards(
    tmp_path: Path, length: Reranker, reranked: RunReranker
) -> None:
    wanted = "".join(f"{x}\n" for lines in reranked.rerank(length, top_k=3) for x in lines)
    output, before = rerank_into(tmp_path / "out", reranked, length, top_k=3)
    assert (output, before) == (tmp_path / "out/bm25.trec", 0)
    assert output.read_text("utf-8") == wanted
    assert sorted(contents(tmp_path / "out")) == ["_qrank.json", "bm25.trec"]
    for n in range(4):
        rerank_into(tmp_path / "cut", reranked, length, top_k=3, shard=Shard(n, 4))
    parts = sorted((tmp_path / "cut").glob("bm25.?-of-4.trec"))
    assert "".join(part.read_text("utf-8") for part in parts) == wanted
    with pytest.raises(InputError, match="top_k: 3 there, 4 now"):
        rerank_into(tmp_path / "out", reranked, length, top_k=4)


@settings(max_examples=30)
@given(place=st.integers(0, 2000), other=st.booleans())
def test_a_killed_run_goes_on_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    length: Reranker,
    reranked: RunReranker,
    place: int,
    other: bool,
) -> None:
    folder = tmp_path_factory.mktemp("killed")

    def stop(name: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rerank_into(folder, reranked, length, progress=stop)
    kept = folder / "_bm25.trec.kept"
    content = kept.read_bytes()[:place]
    kept.write_bytes(content.replace(b"q5 ", b"q6 ") if other else content)
    output, before = rerank_into(folder, reranked, length)
    wanted = "".join(f"{x}\n" for lines in reranked.rerank(length) for x in lines)
    assert output.read_text("utf-8") == wanted
    # The last line may be cut off, and the last query not whole.
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    assert before == max(len({line.split()[0] for line in lines}) - 1, 0) or other


def test_a_run_into_a_folder_by_the_command_line(
    write: Write, bundle: Path, tmp_path: Path
) -> None:
    files = write(RUN, QUERIES, DOCUMENTS)
    out = str(tmp_path / "out")
    code, told, err = invoke(files, bundle, "-o", out, "-k", "1", "--shard", "1/2")
    assert (code, told, err) == (0, "", f"qrank: {out}/run.1-of-2.trec\n")
    assert (tmp_path / "out/run.1-of-2.trec").read_text("utf-8") == "q1 Q0 d3 1 7 qrank\n"
    code, _, err = invoke(files, bundle, "-o", out, "--budget-ms", "9")
    assert code == 2
    assert "-o takes no --budget-ms" in err


def test_other_commands_do_not_read_parquet_as_lines(tmp_path: Path, bundle: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "d.parquet")
    command = ["score", "-m", str(bundle), "-q", "a", str(tmp_path / "d.parquet")]
    assert "is a Parquet file; expected a text" in CliRunner().invoke(main, command).stderr


def peak(files: Files, reranker: Reranker) -> int:
    """Peak Python memory while reranking a run, in bytes."""
    gc.collect()
    tracemalloc.start()
    try:
        run = RunReranker(*files)
        for _ in run.rerank(reranker):
            pass
        run.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_queries(write: Write, longest_first: Reranker) -> None:
    peaks = []
    # Python keeps 2,000 tuples of each length for reuse: the first run fills that pool.
    for count in (1000, 2000):
        queries = {f"query-{i}": f"{i} " + "a" * 1000 for i in range(count)}
        run = [f"{query} Q0 d{i} {i} {-i} x" for query in queries for i in (1, 2, 3)]
        peaks.append(peak(write(run, queries, DOCUMENTS), longest_first))
    assert peaks[1] < peaks[0] + 150_000


def test_documents_are_only_indexed(write: Write, longest_first: Reranker) -> None:
    """20 MB of documents, of which the run needs one."""
    documents = {f"d{i}": "a" * 100_000 for i in range(200)} | {"d1": "b"}
    files = write(["q1 Q0 d1 1 9 x"], QUERIES, documents)
    assert peak(files, longest_first) < 2_000_000
