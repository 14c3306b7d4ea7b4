"""`qrank score --pairs`: rows keep order and columns, nothing is lost, kills cost little."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from conftest import contents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tables_of_pairs import FORMS, PACKED, Rows, read, rows_of, write

from qrank import Reranker, score_files
from qrank.cli import main, progress
from qrank.errors import InputError, QrankError, TargetError
from qrank.system.locks import try_lock

NAMES = [f"a{form}" for form in FORMS] + [f"a.jsonl{packed}" for packed in PACKED] + ["a.csv.gz"]


def scored(reranker: Reranker, rows: Rows, *, raw: bool = False) -> Rows:
    """Rows as they should be written."""
    pairs = [(row["query"], row["document"]) for row in rows]
    found = reranker.score(pairs, raw=True) if raw else reranker.score(pairs)
    return [{**row, "score": score} for row, score in zip(rows, found.tolist(), strict=True)]


def qrank_(*arguments: str | Path, backend: str = "fakes:length") -> Result:
    command = ["score", "-m", "mini", "--backend", backend, *map(str, arguments)]
    return CliRunner().invoke(main, command)


@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_order_and_columns(tmp_path: Path, length: Reranker, name: str) -> None:
    rows = rows_of(50)
    done = score_files(length, write(tmp_path / name, rows), tmp_path / "out", rows=8)
    assert read(tmp_path / "out" / name) == scored(length, rows)
    assert (done.rows, done.rejected, done.written) == (50, 0, [tmp_path / "out" / name])
    assert sorted(contents(tmp_path / "out")) == sorted([name, "_qrank.json"])


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=9)


@settings(max_examples=20)
@given(rows=st.lists(st.tuples(texts, texts), min_size=1), size=st.integers(1, 9))
@example(rows=[('"', 'a, "b"\nc'), (" ", ""), ('"x"', "\n"), ("\ufeff", "\u2028\x1c\x85")], size=2)
@pytest.mark.parametrize("form", FORMS)
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory,
    length: Reranker,
    form: str,
    rows: list[tuple[str, str]],
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    keep = {ord(c): " " for c in "\t\n"} if form == ".tsv" else {}
    told = [
        {"id": str(n), "query": q.translate(keep), "document": d.translate(keep)}
        for n, (q, d) in enumerate(rows)
    ]
    score_files(length, write(folder / f"a{form}", told), folder / "out", rows=size, raw=True)
    assert read(folder / "out" / f"a{form}") == scored(length, told, raw=True)


def test_columns_of_any_type_are_carried_along(tmp_path: Path, length: Reranker) -> None:
    table = pa.table(
        {
            "label": pa.array([1, None, 3], pa.int8()),
            "q": pa.array(["x", "y", "x"]).dictionary_encode(),
            "tags": [["é"], [], None],
            "d": pa.array(["a", "a a", ""], pa.large_string()),
            "at": pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
            "score": [{"bm25": 1.5}, None, {"bm25": 2.5}],
        }
    ).replace_schema_metadata({"by": "us"})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    how: dict[str, Any] = {"query_column": "q", "document_column": "d", "score_column": "relevance"}
    score_files(length, tmp_path / "a.parquet", tmp_path / "out", rows=2, raw=True, **how)
    written = pq.ParquetFile(tmp_path / "out/a.parquet")
    found = written.read()
    assert found.schema.metadata[b"by"] == b"us"
    assert written.metadata.row_group(0).column(0).compression == "ZSTD"
    assert found.drop(["relevance"]).cast(table.schema).equals(table)
    assert found["relevance"].to_pylist() == [5, 6, 4]


def test_fields_of_records_are_carried_along(tmp_path: Path, length: Reranker) -> None:
    record = {
        "query": "q",
        "x": [1, 2.5, {"é": None}],
        "big": 10**30,
        "document": "a",
        "half": "\ud800",
    }
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(record)}\r\n\n", "utf-8")
    score_files(length, tmp_path / "a.jsonl", tmp_path / "out", raw=True)
    (line,) = (tmp_path / "out/a.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {**record, "score": 5.0}
    assert '"é"' in line


def test_equal_pairs_of_a_chunk_are_scored_once(tmp_path: Path) -> None:
    rows = [{"query": "q", "document": text} for text in ["a", "a a", "a"] * 4]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with Reranker("mini", backend="fakes:recording") as reranker:
        fakes.recorded.clear()
        score_files(reranker, path, tmp_path / "out", rows=6, raw=True)
    assert sum(len(work) for work in fakes.recorded) == 4
    assert [row["score"] for row in read(tmp_path / "out/a.jsonl")] == [5, 6, 5] * 4


def test_empty_files_become_empty_files(tmp_path: Path, length: Reranker) -> None:
    for form in FORMS:
        write(tmp_path / f"in/a{form}", [])
    done = score_files(length, tmp_path / "in", tmp_path / "out")
    assert (len(done.written), done.rows) == (4, 0)
    assert (tmp_path / "out/a.csv").read_text("utf-8") == "id,query,document,score\n"
    assert pq.read_schema(tmp_path / "out/a.parquet").names[-1] == "score"


class Stopped(BaseException):
    """Stands for the end of a process."""


def stop_at(rows: int) -> Callable[[str, int, int], None]:
    def stop(name: str, done: int, total: int) -> None:
        if done >= rows:
            raise Stopped

    return stop


@pytest.mark.parametrize("name", NAMES)
def test_what_was_interrupted_goes_on(tmp_path: Path, length: Reranker, name: str) -> None:
    given = write(tmp_path / name, rows_of(60))
    score_files(length, given, tmp_path / "whole", rows=10)
    with pytest.raises(Stopped):
        score_files(length, given, tmp_path / "out", rows=10, progress=stop_at(30))
    assert sorted(contents(tmp_path / "out")) == [f"_{name}.kept", "_qrank.json"]
    done = score_files(length, given, tmp_path / "out", rows=10)
    assert done.kept == 30
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = score_files(length, given, tmp_path / "out", rows=10)
    assert (again.written, again.there) == ([], [tmp_path / "out" / name])


@settings(max_examples=20)
@given(st.data())
def test_a_damaged_record_of_scores_costs_only_time(
    tmp_path_factory: pytest.TempPathFactory, length: Reranker, data: st.DataObject
) -> None:
    """Cut off anywhere, or with another byte."""
    folder = tmp_path_factory.mktemp("damaged")
    given = write(folder / "a.jsonl", rows_of(40))
    with pytest.raises(Stopped):
        score_files(length, given, folder / "out", rows=10, progress=stop_at(40))
    kept = folder / "out/_a.jsonl.kept"
    content = bytearray(kept.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    kept.write_bytes(content)
    done = score_files(length, given, folder / "out", rows=10)
    assert done.kept == 10 * (place // (len(kept_record(10)) or 1))
    assert read(folder / "out/a.jsonl") == scored(length, rows_of(40))


def kept_record(pairs: int) -> bytes:
    """As long as the record of so many pairs: a sha256, and float64."""
    return bytes(32 + 8 * pairs)


def test_a_changed_input_is_scored_again(tmp_path: Path, length: Reranker) -> None:
    rows = rows_of(40)
    given = write(tmp_path / "a.csv", rows)
    with pytest.raises(Stopped):
        score_files(length, given, tmp_path / "out", rows=10, progress=stop_at(30))
    rows[15]["document"] = "another"
    assert score_files(length, write(given, rows), tmp_path / "out", rows=10).kept == 10
    assert read(tmp_path / "out/a.csv") == scored(length, rows)


def test_an_output_older_than_its_input_is_told(
    tmp_path: Path, length: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    given = write(tmp_path / "a.csv", rows_of(4))
    score_files(length, given, tmp_path / "out")
    later = time.time() + 9
    os.utime(given, (later, later))
    score_files(length, given, tmp_path / "out")
    assert "1 outputs are older than their inputs, the first " in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"raw": True}, 'scores: "model" there, "logits" now'),
        ({"rows": 9}, "rows: 10 there, 9 now"),
        ({"score_column": "s"}, 'score_column: "score" there, "s" now'),
        ({"long_documents": "tail"}, 'long_documents: "truncate" there, "tail" now'),
        ({"shard": "0/1"}, "shards: null there, 1 now; inputs: null there"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, length: Reranker, change: dict[str, Any], told: str
) -> None:
    given = write(tmp_path / "a.csv", rows_of(4))
    score_files(length, given, tmp_path / "out", rows=10)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="scored otherwise") as caught:
        score_files(length, given, tmp_path / "out", **{"rows": 10, **change})
    assert told in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_another_target_or_length_is_refused(tmp_path: Path, length: Reranker) -> None:
    given = write(tmp_path / "a.csv", rows_of(4))
    score_files(length, given, tmp_path / "out")
    with (
        Reranker("mini", backend="fakes:ties", max_length=99, threads=1) as other,
        pytest.raises(InputError) as caught,
    ):
        score_files(other, given, tmp_path / "out")
    told = str(caught.value)
    assert re.search(r'target: "fakes:length/\S+@cpu" there, "fakes:ties/\S+@cpu" now', told)
    assert "max_length: 512 there, 99 now" in told
    assert "digest" not in told


def test_a_foreign_output_is_not_taken_for_ours(tmp_path: Path, length: Reranker) -> None:
    given = write(tmp_path / "a.csv", rows_of(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.csv").write_text("mine", "utf-8")
    with pytest.raises(InputError, match=r"a\.csv is there already, and no _qrank\.json says how"):
        score_files(length, given, tmp_path / "out")
    (tmp_path / "out/_qrank.json").write_text("[]", "utf-8")
    with pytest.raises(InputError, match="is damaged"):
        score_files(length, given, tmp_path / "out")
    assert (tmp_path / "out/a.csv").read_text("utf-8") == "mine"


BAD = {
    ".jsonl": [
        ("nonsense", "expected a JSON object, found 'nonsense'"),
        ('{"query": "q"}', 'there is no "document"; the fields are: "query"'),
        ('{"query": null, "document": ""}', '"query" is null'),
        ('{"query": "", "document": 5}', '"document" is 5, not a string'),
        ('{"query": "", "document": ["a"]}', '"document" is a list, not a string'),
        ('{"query": "", "document": {"a": 1}}', '"document" is an object, not a string'),
        ('{"query": "\\ud800", "document": ""}', '"query" holds half of a surrogate pair'),
        ('{"a":' + "[" * 9999, "nested too deeply"),
    ],
    ".csv": [
        ("1,q", "2 fields, where the header has 3"),
        ('1,"q" x,a', "no CSV: "),
        ('1,"q\n,\n2,q" x,a', "no CSV: "),
    ],
    ".tsv": [("1\tq\ta\tb", "4 fields, where the header has 3"), (" ", "1 fields, where")],
}


@pytest.mark.parametrize(
    ("form", "line", "reason"), [(form, *each) for form in BAD for each in BAD[form]]
)
def test_bad_rows_stop_or_are_listed(
    tmp_path: Path, length: Reranker, form: str, line: str, reason: str
) -> None:
    good = rows_of(30)
    path = write(tmp_path / f"a{form}", good[:15])
    before = path.read_text("utf-8")
    after = write(tmp_path / f"b{form}", good[15:]).read_text("utf-8")
    rest = after if form == ".jsonl" else after.partition("\n")[2]
    path.write_text(before + line + "\n" + rest, "utf-8")
    number = before.count("\n") + 1
    with pytest.raises(InputError) as caught:
        score_files(length, path, tmp_path / "out", rows=10)
    assert f"a{form}, line {number}: " in str(caught.value)
    assert reason in str(caught.value)
    assert "--on-error reject" in str(caught.value)
    done = score_files(length, path, tmp_path / "out", rows=10, on_error="reject")
    assert (done.rows, done.rejected, done.kept) == (31, 1, 10)
    assert read(tmp_path / "out" / path.name) == scored(length, good)
    (listed,) = done.rejects
    assert listed == tmp_path / f"out/_a{form}.rejects"
    (told,) = map(json.loads, listed.read_text("utf-8").splitlines())
    assert reason in told.pop("reason")
    assert told == {"line": number, "text": line}


def test_bad_rows_of_parquet(tmp_path: Path, length: Reranker) -> None:
    table = pa.table({"query": ["q", None, "q", "q"], "document": ["a", "a", "?", "a a"]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"\x01\0\0\0?", b"\x01\0\0\0\xff"))
    with pytest.raises(InputError, match=r'a\.parquet, row 1: "query" is null'):
        score_files(length, path, tmp_path / "out", raw=True)
    done = score_files(length, path, tmp_path / "out", raw=True, on_error="reject")
    assert [json.loads(line) for line in done.rejects[0].read_text("utf-8").splitlines()] == [
        {"row": 1, "reason": '"query" is null'},
        {"row": 2, "reason": '"document" is no UTF-8'},
    ]
    assert [row["score"] for row in read(tmp_path / "out/a.parquet")] == [5, 6]


def test_a_file_of_bad_rows_alone_is_an_error(tmp_path: Path, length: Reranker) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "text": ""}\n' * 3, "utf-8")
    with pytest.raises(InputError, match=r'none of the 3 rows .* there is no "document"'):
        score_files(length, path, tmp_path / "out", rows=2, on_error="reject")
    assert list(contents(tmp_path / "out")) == ["_qrank.json"]


def unusable(path: Path) -> Path:
    """A file that cannot be read as its name says."""
    path.write_bytes(b"PAR1 nonsense PAR1" if path.suffix == ".parquet" else b"\0\1\2")
    return path


@pytest.mark.parametrize(
    ("make", "how", "told"),
    [
        (lambda p: write(p / "a.csv", []), {"document_column": "text"}, 'no column "text"; there'),
        (
            lambda p: write(p / "a.parquet", []),
            {"query_column": "x"},
            "name it with --query-column",
        ),
        (
            lambda p: write(p / "a.tsv", []),
            {"score_column": "id"},
            'has a "id" already; name another',
        ),
        (lambda p: write(p / "a.jsonl", rows_of(2)), {"score_column": "id"}, 'line 1 has a "id"'),
        (lambda p: [], {}, "there is no file to score"),
        (lambda p: p / "none.csv", {}, "there is no such file"),
        (lambda p: p / "*.csv", {}, "there is no such file"),
        (lambda p: write(p / "a.csv", []).rename(p / "a.txt"), {}, "expected .parquet, .jsonl"),
        (lambda p: write(p / "a.csv", []).rename(p / "a.parquet.gz"), {}, "expected .parquet, "),
        (lambda p: unusable(p / "a.parquet"), {}, "cannot be read as Parquet"),
        (lambda p: unusable(p / "a.jsonl"), {}, "expected a text file"),
        (lambda p: (p / "a.csv").touch() or p / "a.csv", {}, "is empty: expected a line with"),
        (lambda p: write(p / "out/a.csv", []), {}, "where the outputs are to be written"),
        (lambda p: [write(p / x / "a.csv", []) for x in "ab"], {}, "both be written to a.csv"),
        (lambda p: write(p / "a.csv", []), {"shard": "3/3"}, "no shard 3/3: shards are numbered"),
        (lambda p: write(p / "a.csv", []), {"rows": 0}, "rows"),
        (lambda p: write(p / "a.csv", []), {"on_error": "skip"}, "on_error"),
    ],
)
def test_what_cannot_be_scored_is_said_at_once(
    tmp_path: Path, length: Reranker, make: Callable[[Path], Any], how: dict[str, Any], told: str
) -> None:
    given = make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError) as caught:
        score_files(length, given, tmp_path / "out", **how)
    assert told in str(caught.value)
    after = contents(tmp_path)
    after.pop("out/_qrank.json", None)
    assert after == before


def test_a_column_of_numbers_is_refused(tmp_path: Path, length: Reranker) -> None:
    pq.write_table(pa.table({"query": ["q"], "document": [5]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match='the column "document" holds int64, not strings'):
        score_files(length, tmp_path / "a.parquet", tmp_path / "out")


def test_patterns_and_folders_keep_the_paths_below_them(tmp_path: Path, length: Reranker) -> None:
    for name in ("day=1/p.jsonl", "day=2/p.jsonl", "day=2/_p.jsonl", ".x/p.jsonl", "README.txt"):
        write(tmp_path / "in" / name, rows_of(2))
    for files in (tmp_path / "in", tmp_path / "in/**/p.jsonl", str(tmp_path / "in/day=*/p.*")):
        out = tmp_path / f"out{len(str(files))}"
        score_files(length, files, out)
        assert sorted(contents(out)) == ["_qrank.json", "day=1/p.jsonl", "day=2/p.jsonl"]


def test_errors_of_a_backend_name_the_file(tmp_path: Path) -> None:
    given = write(tmp_path / "a.csv", [{"id": "", "query": "q", "document": "a " * 60}])
    with (
        Reranker("mini", backend="fakes:nan_when_long") as reranker,
        pytest.raises(TargetError, match=r"a\.csv: .* gave nan for document 0"),
    ):
        score_files(reranker, given, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["_qrank.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of a file's size here")
@pytest.mark.parametrize("form", [".parquet", ".jsonl.gz"])
def test_a_full_disk_leaves_what_was_kept(tmp_path: Path, form: str) -> None:
    """A limit of a file's size stands for a full disk."""
    given = write(tmp_path / f"a{form}", rows_of(2000))
    command = f"ulimit -f 8; {sys.executable} -W error -m qrank score -m mini --rows 200"
    command += f" --backend fakes:length --pairs {given} -o {tmp_path}/out"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(["bash", "-c", command], env=here, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"_a{form}." in done.stderr
    assert "name another folder" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert f"_a{form}.part" not in contents(tmp_path / "out")


def start(given: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The command, with a backend that takes 5 ms a pair."""
    command = [sys.executable, "-m", "qrank", "score", "-m", "mini", "--backend", "fakes:sleepy"]
    command += ["--pairs", str(given), "-o", str(out), "--rows", "10", *more]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(command, env=here, text=True, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> str:
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0, told
    return told


def test_a_killed_run_goes_on(tmp_path: Path, length: Reranker) -> None:
    for name in ("a.parquet", "b.jsonl.gz"):
        write(tmp_path / "in" / name, rows_of(60))
    out = tmp_path / "out"
    for least in (1, 4):
        process = start(tmp_path / "in", out)
        while process.poll() is None:
            if sum(p.stat().st_size for p in out.glob("_*.kept")) > least * 80 or (
                least > 3 and (out / "a.parquet").exists()
            ):
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "b.jsonl.gz").exists()
    told = finish(start(tmp_path / "in", out))
    assert "of them scored before" in told or "1 were there" in told
    score_files(length, tmp_path / "in", tmp_path / "whole", rows=10)
    assert without_settings(out) == without_settings(tmp_path / "whole")


def without_settings(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "_qrank.json"}


def test_four_shards_twice_at_once_are_one_run(tmp_path: Path, length: Reranker) -> None:
    """Fewer files than shards: rows are shared out; two processes have the same shard."""
    names = ("a.parquet", "b.jsonl", "c.tsv")
    for count, name in zip((35, 4, 71), names, strict=True):
        write(tmp_path / "in" / name, rows_of(count))
    score_files(length, tmp_path / "in", tmp_path / "one", rows=10)
    shards = ["0/4", "1/4", "2/4", "3/4", "3/4"]
    for process in [start(tmp_path / "in", tmp_path / "out", "--shard", each) for each in shards]:
        finish(process)
    assert not list((tmp_path / "out").glob("_[!q]*"))
    for name in names:
        stem, suffix = name.split(".")
        parts = sorted((tmp_path / "out").glob(f"{stem}.?-of-4.{suffix}"))
        assert [row for part in parts for row in read(part)] == read(tmp_path / "one" / name)


def test_another_process_is_waited_for(
    tmp_path: Path, length: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that is held: the other file is scored meanwhile, and this one afterwards."""
    for name in "ab":
        write(tmp_path / f"in/{name}.csv", rows_of(9))
    out = tmp_path / "out"
    out.mkdir()
    with (out / "_a.csv.kept").open("a+b") as held:
        assert try_lock(held)
        thread = threading.Thread(target=score_files, args=(length, tmp_path / "in", out))
        thread.start()
        while not (out / "b.csv").exists() or "waiting for a.csv" not in caplog.text:
            time.sleep(0.01)
        assert not (out / "a.csv").exists()
    thread.join()
    assert sorted(contents(out)) == ["_qrank.json", "a.csv", "b.csv"]
    assert read(out / "a.csv") == scored(length, rows_of(9))


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, length: Reranker) -> None:
    peaks: list[int] = []
    for count in (300, 300, 1200):  # the first warms caches up
        rows = [{"id": "", "query": "q", "document": "a" * 5000}] * count
        given = write(tmp_path / f"{len(peaks)}/a.jsonl", rows)
        tracemalloc.start()
        score_files(length, given, tmp_path / f"out{len(peaks)}", rows=50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 200_000


def test_a_row_group_is_read_in_pieces(tmp_path: Path, length: Reranker) -> None:
    """One row group of 32 MB, which does not compress."""
    chance = np.random.default_rng(0)
    documents = [chance.bytes(4000).hex() for _ in range(4000)]
    table = pa.table({"query": ["q"] * len(documents), "document": documents})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none")
    del table, documents
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(Stopped):
            score_files(
                length, tmp_path / "a.parquet", tmp_path / "out", rows=50, progress=stop_at(200)
            )
    finally:
        pa.set_memory_pool(before)
    assert 0 < pool.max_memory() < 12e6


def test_command_line(tmp_path: Path, length: Reranker) -> None:
    for name in "ab":
        write(tmp_path / f"in/{name}.jsonl", rows_of(9))
    out = tmp_path / "out"
    given: list[str | Path] = [
        "--pairs",
        tmp_path / "in/a.jsonl",
        tmp_path / "in/b.jsonl",
        "-o",
        out,
        "--raw",
    ]
    done = qrank_(*given)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "qrank: wrote 2 files of 18 rows\n"
    assert read(out / "b.jsonl") == scored(length, rows_of(9), raw=True)
    (tmp_path / "in/c.jsonl").write_text(
        "x\n" + (tmp_path / "in/a.jsonl").read_text("utf-8"), "utf-8"
    )
    done = qrank_(*given, tmp_path / "in/c.jsonl")
    assert done.exit_code == 2
    assert "c.jsonl, line 1: expected a JSON object, found 'x'; --on-error reject" in done.stderr
    done = qrank_(*given, tmp_path / "in/c.jsonl", "--on-error", "reject")
    told = done.stderr.splitlines()
    assert told[0] == "qrank: wrote 1 files of 10 rows; 2 were there"
    assert told[1] == f"qrank: 1 rows were left out; {out / '_c.jsonl.rejects'} lists them"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--pairs", "a.csv"], "--pairs goes with -o FOLDER"),
        (["-o", "out", "-q", "x"], "-o goes with --pairs or --run"),
        (["--shard", "1/2", "-q", "x"], "--shard goes with -o"),
        (["--rows", "5", "-q", "x"], "--rows goes with --pairs"),
        (
            ["--query-column", "q", "--run", "a.csv", "-o", "out"],
            "--query-column goes with --pairs",
        ),
        (["--pairs", "a.csv", "-o", "out", "-q", "x"], "--pairs takes no -q"),
        (["--pairs", "a.csv", "-o", "out", "-k", "0"], "--pairs takes no --top-k"),
        (["--pairs", "a.csv", "-o", "out", "--run", "a.csv"], "--pairs takes no --run"),
        (["--pairs", "a.csv", "-o", "out", "--queries", "a.csv"], "--pairs takes no --queries"),
        (["--pairs", "a.csv", "-o", "out", "--shard", "x"], "expected a shard such as 3/16"),
        (["--pairs", "a.csv", "-o", "a.csv"], "is a file"),
        (
            ["--pairs", "a.csv", "-o", "out", "--raw", "--scores", "calibrated"],
            "give --scores calibrated or --raw",
        ),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", [])
    done = qrank_(*arguments)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_logs_get_a_line_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files of text, the first tells how many rows the others have."""
    for name in "ab":
        write(tmp_path / f"in/{name}.csv", rows_of(20))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    seconds = iter(range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=seconds.__next__))
    done = qrank_("--pairs", tmp_path / "in", "-o", tmp_path / "out", "--rows", "10")
    lines = done.stderr.splitlines()
    assert "qrank: scoring: 10 of 40, 10.0/s, 0 min left" in lines
    assert lines[-2].startswith("qrank: scoring: 40 of 40, ")


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, length: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path / "in/a.parquet", [])
    write(tmp_path / "in/a.csv", [])
    with pytest.raises(QrankError, match=r"pip install .qrank\[parquet\]"):
        score_files(length, tmp_path / "in/a.parquet", tmp_path / "out")
    assert score_files(length, tmp_path / "in/a.csv", tmp_path / "out").written
