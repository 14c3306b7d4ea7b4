"""The command line, in terminals and pipes."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from commands import on_a_terminal, qrank_, score, shell

import qrank
from qrank import Reranker, errors
from qrank.bundle.locate import bundled
from qrank.bundle.manifest import Manifest
from qrank.cli import main
from qrank.converters.checkpoint.card import cards

TEXTS = ["a a", "a a a a", "", "a"]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")
    return path


def test_tsv_is_what_a_pipe_gets(bundle: Path, documents: Path) -> None:
    result = score(bundle, documents)
    assert result.exit_code == 0
    assert result.stderr == ""
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("1", "1", "a a a a"),
        ("2", "0", "a a"),
        ("3", "3", "a"),
        ("4", "2", ""),
    ]
    assert all(0 < float(row[1]) <= 1 for row in rows)


def test_json(bundle: Path, documents: Path) -> None:
    content = json.loads(score(bundle, "--format", "json", documents).stdout)
    assert list(content) == ["model", "target", "results"]
    assert content["model"] == Manifest.load(bundle).name
    assert content["target"].endswith("@cpu")
    assert [result["index"] for result in content["results"]] == [1, 0, 3, 2]
    assert set(content["results"][0]) == {"index", "score", "text"}


def test_jsonl_keeps_other_fields(bundle: Path) -> None:
    lines = [{"id": "x", "text": "a", "tags": ["é"], "score": "old"}, {"text": "a a", "index": 99}]
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    result = score(bundle, "--jsonl", "--raw", "--format", "jsonl", stdin=stdin)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"text": "a a", "index": 1, "score": 6.0},
        {"id": "x", "text": "a", "tags": ["é"], "score": 5.0, "index": 0},
    ]


def test_trec(bundle: Path) -> None:
    stdin = '{"id": "x", "text": "a"}\n{"_id": "y", "text": "a a"}\n{"text": "a a a"}\n'
    result = score(bundle, "--jsonl", "--format", "trec", stdin=stdin)
    assert result.stdout.splitlines() == [
        "q Q0 2 1 7 qrank",
        "q Q0 y 2 6 qrank",
        "q Q0 x 3 5 qrank",
    ]


@pytest.mark.parametrize("identity", ["two words", "", "tab\t", "line\n"])
def test_trec_refuses_an_id_that_breaks_its_columns(bundle: Path, identity: str) -> None:
    stdin = json.dumps({"id": identity, "text": "a"})
    result = score(bundle, "--jsonl", "--format", "trec", stdin=stdin)
    assert result.exit_code == 2
    assert "no single word" in result.stderr


def test_table_on_a_terminal_fits_80_columns(bundle: Path, tmp_path: Path) -> None:
    texts = ["a " * 300, "火星是红色的" * 60, "🪐" * 90, "short"]
    (tmp_path / "d.txt").write_text("\n".join(texts), "utf-8")
    command = f"qrank score -m $BUNDLE -q a {shlex.quote(str(tmp_path / 'd.txt'))}"
    lines = on_a_terminal(command, bundle).splitlines()
    plain = [click.unstyle(line) for line in lines]
    assert plain[0].split() == ["rank", "score", "index", "document"]
    assert len([line for line in plain if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])]) == 4
    from rich.cells import cell_len

    assert max(cell_len(line) for line in plain) <= 80
    assert f"{Manifest.load(bundle).name}, openvino-int8@cpu" in plain[-1]


@pytest.mark.parametrize("format", ["table", "tsv"])
def test_documents_cannot_reach_the_terminal_or_break_columns(bundle: Path, format: str) -> None:
    evil = "a\tb\x1b[2J\x1b]0;title\x07\x08\x9b31m\u202e\u2028\x85[red]c"
    result = score(bundle, "--jsonl", "-f", format, stdin=json.dumps({"text": evil}) + "\n")
    assert result.exit_code == 0
    shown = [line for line in result.stdout.splitlines() if "[red]c" in line]
    assert len(shown) == 1
    assert shown[0].replace("\t", " ").isprintable()
    if format == "tsv":
        assert len(result.stdout.splitlines()) == 1
        assert result.stdout.count("\t") == 3


@pytest.mark.parametrize("format", ["table", "tsv", "json", "jsonl", "trec"])
@pytest.mark.parametrize("text", ["", "lone \ud800", "\0", "🪐", "a" * 100_000])
def test_every_format_takes_any_text(bundle: Path, format: str, text: str) -> None:
    stdin = json.dumps({"id": 1, "text": text, "other": "\udfff"}) + "\n"
    result = score(bundle, "--jsonl", "--format", format, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.exception is None
    if format == "json":
        (record,) = json.loads(result.stdout)["results"]
        assert record["text"] == text
        assert record["other"] == "\udfff"


def test_top_k_zero_prints_nothing(bundle: Path, documents: Path) -> None:
    assert score(bundle, "--top-k", "0", documents).stdout == ""
    assert json.loads(score(bundle, "-k", "0", "-f", "json", documents).stdout)["results"] == []


def test_top_k(bundle: Path, documents: Path) -> None:
    assert len(score(bundle, "-k", "2", documents).stdout.splitlines()) == 2
    assert score(bundle, "-k", "-1", documents).exit_code == 2


def test_raw_and_min_score(bundle: Path, documents: Path) -> None:
    rows = score(bundle, "--raw", "--min-score", "5.5", documents).stdout.splitlines()
    assert [row.split("\t")[1] for row in rows] == ["8", "6"]


def test_stdin_and_several_files(bundle: Path, documents: Path) -> None:
    more = documents.with_name("more.txt")
    more.write_text("a a a a a a", "utf-8")
    result = score(bundle, documents, more, "-", stdin="a a a\n")
    indices = [line.split("\t")[2] for line in result.stdout.splitlines()]
    assert indices == ["4", "1", "5", "0", "3", "2"]


def test_blank_lines_count_and_line_ends_do_not(bundle: Path) -> None:
    result = score(bundle, "-f", "json", stdin=b"\r\na a\r\n\n  \na a a")
    found = {r["index"]: r["text"] for r in json.loads(result.stdout)["results"]}
    assert found == {0: "", 1: "a a", 2: "", 3: "  ", 4: "a a a"}


def test_no_documents_no_results_and_a_notice(bundle: Path) -> None:
    result = score(bundle, stdin="")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "qrank: there is no document to rank\n"


def test_bytes_that_are_no_text_are_replaced(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"a \xff a\n")
    assert "a \ufffd a" in score(bundle, tmp_path / "d.txt").stdout
    done = shell("printf 'a \\xff a\\n' | qrank score -m $BUNDLE -q a", bundle)
    assert done.returncode == 0, done.stderr
    assert "a \ufffd a" in done.stdout


@pytest.mark.parametrize("locale", ["LC_ALL=C", "LC_ALL=POSIX", "PYTHONIOENCODING=ascii"])
def test_results_are_utf8_whatever_the_locale(bundle: Path, locale: str) -> None:
    """PYTHONIOENCODING simulates a pipe on Windows, which has a code page."""
    done = shell(f"echo 'märs 🪐' | {locale} qrank score -m $BUNDLE -q ü -f jsonl", bundle)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "märs 🪐"


def test_an_error_of_the_operating_system_is_one_line(checkpoint_of: Callable[[str], Path]) -> None:
    result = qrank_("convert", checkpoint_of("bert"), "-o", "/dev/null/bundle")
    assert result.exit_code == 8
    (line,) = result.stderr.splitlines()
    assert line.startswith("qrank: error: ")
    assert "/dev/null" in line


def test_a_full_disk_is_one_line(bundle: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell("echo mars | qrank score -m $BUNDLE -q a > /dev/full", bundle)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("qrank: error: ")


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "5", '"text"', '{"txt": "a"}', '{"text": 5}', '{"text": null}'),
        *('{"text": "a", "title": 5}', "[" * 9999, '{"text": "a", "n": ' + "9" * 5000 + "}"),
    ],
)
def test_a_bad_json_line_is_named(bundle: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n', "utf-8")
    result = score(bundle, "--jsonl", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{path}, line 2: " in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_truncation_is_noticed(bundle: Path) -> None:
    result = score(bundle, "--max-length", "20", stdin="a " * 50 + "\na\n")
    assert len(result.stdout.splitlines()) == 2
    assert "1 of the 2 documents shown did not fit" in result.stderr
    chunked = score(
        bundle, "--max-length", "20", "--long-documents", "chunk", "-f", "json", stdin="a " * 50
    )
    assert chunked.stderr == ""
    (record,) = json.loads(chunked.stdout)["results"]
    assert record["part"] == [0, 31]
    truncated = score(bundle, "--max-length", "20", "-f", "json", stdin="a " * 50)
    assert json.loads(truncated.stdout)["results"][0]["truncated"] is True


def test_a_query_beyond_the_limit_is_noticed_once(bundle: Path) -> None:
    result = qrank_(
        *("score", "-m", bundle, "--backend", "fakes:length", "-q", "a " * 50),
        *("--max-length", "20"),
        stdin="a\n",
    )
    assert result.exit_code == 0
    assert result.stderr.count("the query has 50 tokens") == 1


@pytest.mark.parametrize(
    ("without", "target"), [(None, "openvino-int8@cpu"), ("openvino", "onnx-int8@cpu")]
)
def test_the_default_model_is_noticed(
    without: str | None, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And runs on the fastest runtime that is installed; nothing is said about the others."""
    if without is not None:
        monkeypatch.setitem(sys.modules, without, None)
    command = ("score", "-q", "which planet is red?", "-f", "json")
    result = qrank_(*command, stdin="bread\nmars is red\n")
    assert result.exit_code == 0
    assert result.stderr == "qrank: no --model given: using the bundled mini\n"
    found = json.loads(result.stdout)
    assert found["target"] == target
    assert found["results"][0]["index"] == 1


def test_version() -> None:
    assert qrank_("--version").stdout == f"qrank, version {qrank.__version__}\n"


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_fits_80_columns(command: str | None) -> None:
    result = qrank_(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout == qrank_(*([command] if command else []), "-h").stdout


def examples(command: click.Command) -> list[str]:
    """The command lines in a command's help that run qrank."""
    blocks = (command.help or "").split("\b\n")[1:]
    lines = [line.strip() for block in blocks for line in block.split("\n\n")[0].splitlines()]
    parts = [part.strip() for line in lines for part in line.split("|")]
    return [part for part in parts if part.startswith("qrank ")]


@pytest.mark.parametrize("name", [None, *main.commands])
def test_every_help_has_examples_that_are_right(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they name is an option, an argument and a value that click takes."""
    monkeypatch.chdir(tmp_path)
    found = examples(main.commands[name] if name else main)
    assert found
    for line in found:
        words = shlex.split(line.partition(">")[0])[1:]
        for word in words:
            if Path(word).suffix in {".txt", ".jsonl", ".trec"} or word == "FILE":
                Path(word).touch()
        Path("beir/scifact").mkdir(parents=True, exist_ok=True)
        context = click.Context(main, info_name="qrank")
        _, command, rest = main.resolve_command(context, words)
        assert command is not None
        with command.make_context(command.name, rest, parent=context):
            assert command.name == name or name in (None, "calibrate")


def test_the_list_of_commands_is_not_cut_off() -> None:
    assert "..." not in qrank_("--help").stdout.partition("Commands:")[2]


@pytest.mark.parametrize("shell_", ["bash", "zsh", "fish"])
def test_completion(shell_: str) -> None:
    result = qrank_("completion", shell_)
    assert result.exit_code == 0
    assert "_QRANK_COMPLETE" in result.stdout


def test_completion_completes(bundle: Path) -> None:
    done = shell("_QRANK_COMPLETE=bash_complete COMP_WORDS='qrank sc' COMP_CWORD=1 qrank", bundle)
    assert done.stdout == "plain,score\n"


def test_exit_codes_are_those_of_the_help(tmp_path: Path, bundle: Path) -> None:
    """One command for each error class that is cheap to provoke; the others by class only."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"architectures": ["OddModel"]}', "utf-8")
    (tmp_path / "damaged").mkdir()
    text = (bundle / "qrank.json").read_text("utf-8")
    (tmp_path / "damaged/qrank.json").write_text(text.replace("bert", "beet", 1), "utf-8")
    commands: dict[type[errors.QrankError], list[str | Path]] = {
        errors.InputError: ["score", "-q", "x", "-m", bundle, "--max-length", "1"],
        errors.ModelNotFoundError: ["score", "-q", "x", "-m", "nano"],
        errors.BundleError: ["inspect", tmp_path / "damaged"],
        errors.FamilyError: ["convert", tmp_path / "odd"],
        errors.TargetError: ["score", "-q", "x", "-m", bundle, "--backend", "tflite"],
        errors.ConversionError: ["convert", tmp_path, "--to", "onnx", "--precision", "int3"],
    }
    for kind, command in commands.items():
        result = qrank_(*command)
        assert result.exit_code == kind.exit_code, (command, result.output)
        assert result.stderr.startswith("qrank: error: ") or command[0] == "score"
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
    assert qrank_("score", "--nonsense").exit_code == errors.InputError.exit_code
    described = " ".join(qrank_("--help").stdout.partition("Exit codes:")[2].split())
    kinds = (getattr(errors, name) for name in errors.__all__)
    for code in sorted({kind.exit_code for kind in kinds}):
        assert f"{code} " in described


def test_the_shells_page_has_every_exit_code_variable_and_shell() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs/shell.md").read_text("utf-8")
    kinds = (getattr(errors, name) for name in errors.__all__)
    codes = {kind.exit_code for kind in kinds} | {0, 129, 130, 141, 143}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes
    sources = [path for room in ("qrank", "converters") for path in (root / room).rglob("*.py")]
    read = re.compile(r'environ(?:\.\w+\(|\[)"([A-Z_]+)"|\$(QRANK_[A-Z]+)')
    names = {a or b for path in sources for a, b in read.findall(path.read_text("utf-8"))}
    assert {"QRANK_CACHE", "QRANK_DATA", "HF_ENDPOINT"} <= names
    assert names <= set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))
    for shell_ in ("bash", "zsh", "fish"):
        assert f"`qrank completion {shell_} >" in page


@pytest.mark.parametrize("before", [True, False])
def test_a_traceback_only_with_debug(before: bool) -> None:
    command = ["score", "-q", "x", "-m", "nano"]
    plain = qrank_(*command)
    assert "Traceback" not in plain.stderr
    assert len(plain.stderr.splitlines()) == 1
    debug = qrank_(*(["--debug", *command] if before else [*command, "--debug"]))
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)
    assert debug.exit_code == plain.exit_code == 4


@pytest.mark.parametrize("arguments", [[], ["-q", "x", "-f", "xml"], ["-q", "x", "no-such-file"]])
def test_wrong_usage(arguments: list[str]) -> None:
    result = qrank_("score", "-m", "nano", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_pipe_sees_results_and_nothing_else(bundle: Path) -> None:
    done = shell("yes mars | head -30 | qrank score -m $BUNDLE -q a --threads 1", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 30
    assert "\x1b" not in done.stdout


def test_a_closed_pipe_ends_quietly(bundle: Path) -> None:
    """The output is larger than a pipe's buffer, and only one line of it is read."""
    line = "yes 'mars is a planet and it is red' | head -9000 |"
    done = shell(f"{line} qrank score -m $BUNDLE -q a --backend fakes:length | head -1", bundle)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_standard_input_may_be_closed(bundle: Path) -> None:
    done = shell("qrank score -m $BUNDLE -q a <&-", bundle)
    assert done.returncode == 2
    assert "give FILES" in done.stderr


def test_models_lists_bundles_and_cards() -> None:
    result = qrank_("models")
    assert result.exit_code == 0
    for name in (*bundled(), *(card.name for card in cards())):
        assert f"  {name} " in result.stdout


def test_inspect(bundle: Path) -> None:
    result = qrank_("inspect", bundle)
    assert result.exit_code == 0
    manifest = Manifest.load(bundle)
    for fact in (manifest.digest, manifest.source.fingerprint, manifest.probes.reference):
        assert fact in result.stdout
    for name in manifest.variants:
        assert f"\n{name} " in result.stdout
    table = result.stdout.partition("\n\n")[2]
    assert max(map(len, table.splitlines())) <= 80
    assert "as the manifest says" not in table


def test_inspect_verify(bundle: Path, tmp_path: Path) -> None:
    assert "files are as the manifest says" in qrank_("inspect", bundle, "--verify").stdout
    for path in bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").unlink()
    content = bytearray((bundle / "tokenizer.json").read_bytes())
    content[-2] ^= 1
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert qrank_("inspect", tmp_path).exit_code == 0
    result = qrank_("inspect", tmp_path, "--verify")
    assert result.exit_code == errors.BundleError.exit_code
    assert "tokenizer.json is damaged" in result.stderr


def test_scores_are_those_of_the_library(bundle: Path, reranker: Reranker) -> None:
    texts = ["mars is red", "bread"]
    stdin = "".join(f"{text}\n" for text in texts)
    command = ("score", "-m", bundle, "-q", "which planet is red?", "-f", "json")
    result = qrank_(*command, stdin=stdin)
    found: list[dict[str, Any]] = json.loads(result.stdout)["results"]
    expected = reranker.rank("which planet is red?", texts)
    assert [item["index"] for item in found] == [item.index for item in expected]
    for item, ranking in zip(found, expected, strict=True):
        assert item["score"] == pytest.approx(ranking.score, abs=1e-6)
