"""Text files in many forms: compressed, with a byte order mark, piped, not quite UTF-8."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import QUERY, qrank_, score, shell
from hypothesis import given
from hypothesis import strategies as st

from qrank.errors import FamilyError, InputError
from qrank.system import textfiles
from qrank.system.textfiles import TextFile, read_lines, read_text

WRAPS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip twice": lambda data: gzip.compress(gzip.compress(data)),
    "gzip in two members": lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
ENDS = ["\n", "\r\n", "\r"]
LINES = ["mars is red", "", "  blank\tand tab ", "می\u200cخواهم", "👩\u200d🚀 火星", "last"]

# Line ends and a byte order mark are not part of a line.
lines = st.lists(st.text(st.characters(exclude_characters="\r\n\0\ufeff", codec="utf-8")))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@contextmanager
def piped(tmp_path: Path, data: bytes) -> Iterator[Path]:
    """A named pipe that provides data once."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    path = tmp_path / f"pipe{len(list(tmp_path.iterdir()))}"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    yield path
    writer.join()


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ENDS)
def test_lines_are_the_same_however_they_are_written(
    tmp_path: Path, wrap: str, encoding: str, end: str
) -> None:
    data = WRAPS[wrap](end.join(LINES).encode(encoding))
    assert read_lines(written(tmp_path / "f", data)) == LINES
    with piped(tmp_path, data) as pipe:
        assert read_lines(pipe) == LINES
    assert read_text(tmp_path / "f") == "".join(f"{line}\n" for line in LINES)


@given(lines, st.sampled_from(ENCODINGS), st.booleans(), st.sampled_from(ENDS[:2]))
def test_every_text_is_read_as_it_is_and_found_again(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    encoding: str,
    compressed: bool,
    end: str,
) -> None:
    data = "".join(line + end for line in lines).encode(encoding)
    path = tmp_path_factory.getbasetemp() / "law"
    path.write_bytes(gzip.compress(data) if compressed else data)
    try:
        file = TextFile(path)
    except InputError as error:
        # Control characters only are not text, and some bytes are another file type's signature.
        assert " is " in str(error)  # noqa: PT017
        return
    with file:
        first, again = list(file.places()), list(file.places())
        assert [text for _, _, text in first] == lines
        assert [number for number, _, _ in first] == list(range(1, len(lines) + 1))
        assert first == again
        assert [file.at(place) for _, place, _ in reversed(first)] == lines[::-1]


def test_what_is_copied_may_be_larger_than_memory_should_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "_IN_MEMORY", 10)
    assert read_lines(written(tmp_path / "f", gzip.compress(b"a\n" * 100_000))) == ["a"] * 100_000


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_file_that_grows_is_read_to_where_it_ended(tmp_path: Path, end: bytes) -> None:
    path = written(tmp_path / "f", b"a\nb" + end)
    with TextFile(path) as file:
        found = []
        for _, line in file:
            found.append(line)
            with path.open("ab") as more:
                more.write(b"more\n")
        assert found == [line for _, line in file] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "lines", "told"),
    [
        (b"mars\n\xffed \xe4\xbd\n", ["mars", "\ufffded \ufffd"], "3 bytes are .* in line 2"),
        (b"\xffed and some more", ["\ufffded and some more"], "1 byte is .* in line 1"),
        (
            gzip.compress(b"caf\xe9 au lait", mtime=0),
            ["caf\ufffd au lait"],
            "1 byte is .* in line 1",
        ),
    ],
)
def test_bytes_that_are_no_text_are_counted_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes, lines: list[str], told: str
) -> None:
    with caplog.at_level(logging.WARNING), TextFile(written(tmp_path / "f", data)) as file:
        assert [line for _, line in file] == [line for _, line in file] == lines
    (record,) = caplog.records
    assert re.search(rf"{tmp_path / 'f'}: {told}", record.getMessage())


def zstd(data: bytes) -> bytes:
    """One raw block after a header without a size: RFC 8878."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + (len(data) << 3 | 1).to_bytes(3, "little") + data


def test_zstd_is_read_or_the_package_named(tmp_path: Path) -> None:
    path = written(tmp_path / "f.zst", zstd(b"mars is red\nbread\n"))
    try:
        assert read_lines(path) == ["mars is red", "bread"]
    except InputError as error:
        assert "pip install backports.zstd" in str(error)  # noqa: PT017


REFUSED: dict[str, tuple[bytes, str]] = {
    "zip": (b"PK\x03\x04" + b"a" * 100, "is a ZIP archive"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "is a PDF"),
    "parquet": (b"PAR1" + b"a" * 100, "is a Parquet file"),
    "zero bytes": (b"abc\0def", "is binary, or UTF-16 without a byte order mark"),
    "utf-16 without mark": ("mars".encode("utf-16-le"), "is binary, or UTF-16 without a byte"),
    "another encoding": ("Марс красный\n".encode("cp1251") * 9, "in another encoding than UTF-8"),
    "control characters": (bytes(range(1, 9)) * 50, "is binary"),
    "tar in gzip": (gzip.compress(b"d.txt" + b"\0" * 507 + b"mars\n"), "is binary"),
    "torn gzip": (gzip.compress(b"mars is red\n" * 99)[:-9], "is a damaged gzip file"),
    "wrong gzip": (gzip.compress(b"mars" * 99)[:-8] + b"\1" * 8, "is a damaged gzip file"),
    "torn bzip2": (bz2.compress(b"mars is red\n" * 99)[:-9], "is a damaged bzip2 file"),
    "torn xz": (lzma.compress(b"mars is red\n" * 99)[:-9], "is a damaged xz file"),
    "torn utf-16": ("mars".encode("utf-16")[:-1], "is damaged UTF-16 text"),
    "torn surrogates": (b"\xff\xfe\x00\xd8a\x00", "is damaged UTF-16 text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(bundle: Path, tmp_path: Path, kind: str) -> None:
    """As a file and on standard input."""
    data, message = REFUSED[kind]
    for result in (
        score(bundle, written(tmp_path / "d", data)),
        score(bundle, stdin=data),
        score(bundle, "-", "--jsonl", stdin=data),
    ):
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("qrank: error: ")
        assert message in line
        assert line.isprintable()


class Options:
    """Every option that takes a text file, with a file for it and commands that use it."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        def json_lines(*records: dict[str, Any]) -> str:
            return "".join(json.dumps(record) + "\n" for record in records)

        self.files = {
            "documents.jsonl": json_lines({"id": "d1", "text": "a"}, {"id": "d2", "text": "a a"}),
            "queries.jsonl": json_lines({"id": "q1", "text": "a"}),
            "run.trec": "q1 Q0 d1 1 2 x\nq1 Q0 d2 2 1 x\n",
            "qrels.trec": "q1 0 d2 1\n",
            "lines.txt": "a\na a\n",
            "lines.jsonl": json_lines({"text": "a"}, {"text": "a a"}),
        }
        for name, text in self.files.items():
            (folder / name).write_text(text, "utf-8")
        self.folder = folder
        fake = ("--backend", "fakes:length")
        run: tuple[str | Path, ...] = ("--run", folder / "run.trec")
        run += ("--queries", folder / "queries.jsonl", "--documents", folder / "documents.jsonl")
        self.commands: dict[str, tuple[str | Path, ...]] = {
            "lines": ("score", "-m", bundle, *fake, "-q", QUERY, folder / "lines.txt"),
            "jsonl": ("score", "-m", bundle, *fake, "-q", QUERY, folder / "lines.jsonl", "--jsonl"),
            "run": ("score", "-m", bundle, *fake, *run),
            "eval": ("eval", bundle, *fake, *run, "--qrels", folder / "qrels.trec"),
        }


@pytest.fixture
def options(tmp_path: Path, bundle: Path) -> Options:
    return Options(tmp_path, bundle)


def result_of(printed: str) -> list[str]:
    """A command's output, without eval's notes on folder names and cached results."""
    table = [line for line in printed.splitlines() if line.startswith("fakes:")]
    return table or printed.splitlines()


@pytest.mark.parametrize("command", ["lines", "jsonl", "run", "eval"])
@pytest.mark.parametrize("wrap", ["gzip", "xz"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_every_option_that_takes_a_file_reads_it_rightly(
    options: Options, command: str, wrap: str, encoding: str
) -> None:
    expected = qrank_(*options.commands[command])
    assert expected.exit_code == 0, expected.stderr
    assert expected.stdout
    for name, text in options.files.items():
        data = WRAPS[wrap](text.replace("\n", "\r\n").encode(encoding))
        (options.folder / name).write_bytes(data)
    found = qrank_(*options.commands[command])
    assert (found.exit_code, found.stderr) == (0, expected.stderr)
    assert result_of(found.stdout) == result_of(expected.stdout)


def test_every_option_that_takes_a_file_takes_a_pipe(options: Options, bundle: Path) -> None:
    """With process substitution, and one of them with standard input."""
    if not Path("/dev/fd").exists():
        pytest.skip("no process substitution here")
    for name in ("run", "eval"):
        command = options.commands[name]
        words = [
            f"<(cat {word})"
            if isinstance(word, Path) and word.parent == options.folder and word.suffix
            else f"'{word}'"
            for word in command
        ]
        expected = result_of(qrank_(*command).stdout)
        done = shell(f"qrank {' '.join(words)}", bundle)
        assert (done.returncode, result_of(done.stdout)) == (0, expected), done.stderr


@pytest.mark.parametrize("name", ["--run", "--queries", "--documents"])
def test_any_one_file_may_be_standard_input(options: Options, name: str) -> None:
    command = list(options.commands["run"])
    place = command.index(name) + 1
    path, command[place] = Path(command[place]), "-"
    found = qrank_(*command, stdin=path.read_bytes())
    assert found.exit_code == 0, found.stderr
    assert found.stdout == qrank_(*options.commands["run"]).stdout


def test_standard_input_is_given_once(options: Options, bundle: Path) -> None:
    command = [*options.commands["run"][:5], "--run", "-", "--queries", "-", "--documents", "-"]
    for result in (qrank_(*command, stdin="x"), score(bundle, "-", "-", stdin="x")):
        assert (result.exit_code, result.stdout) == (2, "")
        assert "standard input can be read only once" in result.stderr


def test_a_file_may_be_called_a_dash(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("./-").write_bytes(b"a a a\n")
    assert score(bundle, "./-", stdin="a\n").stdout.endswith("\ta a a\n")


def test_small_files_are_read_by_the_same_reader(tmp_path: Path) -> None:
    """A user's own card, and a server's keys."""
    from qrank.converters.checkpoint.card import find_card
    from qrank.serve.keys import read_keys

    keys = written(tmp_path / "keys", "one\r\n\r\n two \r\n".encode("utf-16"))
    assert read_keys(keys) == (b"one", b"two")
    keys.write_bytes(b"\xef\xbb\xbfone\n")
    assert read_keys(keys) == (b"one",)
    card = (Path(__file__).parent / "llama.toml").read_bytes()
    path = written(tmp_path / "llama.toml", b"\xef\xbb\xbf" + card.replace(b"\n", b"\r\n"))
    assert find_card(str(path), {}).name == "llama"
    path.write_text("name = " + "[" * 99_999, "utf-8")
    with pytest.raises(FamilyError, match="is not valid TOML"):
        find_card(str(path), {})


def test_the_place_for_copies_is_named_when_it_is_full(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be written to simulates a full disk."""

    class Full(io.BytesIO):
        def __init__(self, size: int) -> None:
            super().__init__()

        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", Full)
    result = score(bundle, written(tmp_path / "d.gz", gzip.compress(b"a\n")))
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "No space left on device" in line
    assert " are free there; TMPDIR names another folder" in line
