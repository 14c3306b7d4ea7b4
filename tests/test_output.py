"""Output: unchanged texts, numbers to the last digit, and reports of what was not read."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from commands import on_a_terminal, qrank_, score
from hypothesis import given
from hypothesis import strategies as st

from qrank.quality.rerank_run import LOGIT


def characters() -> dict[str, list[str]]:
    """Unicode category -> up to 40 of its characters; all controls, formats and separators."""
    found: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        found.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    pick = random.Random(0).sample
    whole = {"Cc", "Cf", "Zl", "Zp", "Zs"}
    return {
        kind: all_ if kind in whole else pick(all_, min(40, len(all_)))
        for kind, all_ in found.items()
    }


STEERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Classes of Unicode's bidirectional algorithm whose characters affect the text around them."""


def goes(character: str) -> bool:
    """Whether a character breaks a line or a column, or controls a terminal."""
    return (
        unicodedata.category(character) in {"Cc", "Zl", "Zp"}
        or unicodedata.bidirectional(character) in STEERING
    )


@pytest.mark.parametrize("format", ["tsv", "table"])
def test_every_character_is_printed_but_what_breaks_a_line_or_steers(
    bundle: Path, format: str
) -> None:
    every = [c for kind in characters().values() for c in kind]
    stdin = "".join(json.dumps({"text": f"x{c}y"}) + "\n" for c in every)
    result = score(bundle, "--jsonl", "-f", format, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.split("\n")[:-1]
    if format == "tsv":
        shown = {int(row[2]): row[3] for row in (line.split("\t") for line in lines)}
    else:
        rows = [line.split(maxsplit=2) for line in lines[1 : 1 + len(every)]]
        shown = {int(row[2].partition(" ")[0]): row[2].partition("  ")[2].rstrip() for row in rows}
    assert len(lines) == len(every) + (2 if format == "table" else 0)
    for index, character in enumerate(every):
        name = f"U+{ord(character):04X}"
        if unicodedata.category(character) == "Cs":
            # A lone surrogate is not text: it is printed as a JSON escape.
            assert shown[index] == f"x\\u{ord(character):x}y", name
        else:
            assert shown[index] == f"x{' ' if goes(character) else character}y", name


def test_words_of_joined_letters_stay_whole(bundle: Path) -> None:
    text = (
        "می\u200cخواهم 👩\u200d💻 ｆｕｌｌ\u3000ｗｉｄｔｈ soft\u00adhyphen 🏴\U000e0067\U000e007f"
    )
    assert score(bundle, stdin=text).stdout.endswith(f"\t{text}\n")
    assert "👩\u200d💻" in on_a_terminal("echo '👩\u200d💻' | qrank score -m $BUNDLE -q a", bundle)


@given(st.floats(-(2.0**120), 2.0**120, width=32))
def test_two_logits_that_differ_are_written_differently(logit: float) -> None:
    written = float(f"{logit:{LOGIT}}")
    assert np.float32(written) == np.float32(logit)
    above = np.nextafter(np.float32(logit), np.float32(np.inf))
    assert written < float(f"{float(above):{LOGIT}}")


def test_a_run_orders_what_six_decimals_would_tie(bundle: Path, tmp_path: Path) -> None:
    """By scores only, like an evaluator: ids would give the reverse order."""
    documents = "".join(
        json.dumps({"id": name, "text": "a " * count}) + "\n"
        for name, count in (("a", 1), ("b", 2), ("c", 3))
    )
    result = score(bundle, "--jsonl", "-f", "trec", stdin=documents, backend="fakes:hair")
    columns = [line.split() for line in result.stdout.splitlines()]
    assert [column[2] for column in columns] == ["c", "b", "a"]
    assert len({column[4] for column in columns}) == 3


@pytest.mark.parametrize(
    ("long_documents", "read"), [("truncate", "beginning"), ("tail", "end"), ("chunk", None)]
)
@pytest.mark.parametrize("as_run", [False, True])
def test_what_was_not_read_is_told(
    bundle: Path, tmp_path: Path, long_documents: str, read: str | None, as_run: bool
) -> None:
    options = ["--max-length", "20", "--long-documents", long_documents]
    if as_run:
        (tmp_path / "r").write_text("q Q0 d1 1 1 x\nq Q0 d2 1 1 x\n", "utf-8")
        (tmp_path / "q").write_text('{"id": "q", "text": "a"}\n', "utf-8")
        lines = [{"id": "d1", "text": "a " * 50}, {"id": "d2", "text": "a"}]
        (tmp_path / "d").write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")
        files = (
            "--run",
            tmp_path / "r",
            "--queries",
            tmp_path / "q",
            "--documents",
            tmp_path / "d",
        )
        command = ("score", "-m", bundle, "--backend", "fakes:length", *files)
        result = qrank_(*command, *options)
    else:
        result = score(bundle, *options, stdin="a " * 50 + "\na\n")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    if read is None:
        assert result.stderr == ""
    else:
        assert f"1 of the 2 documents shown did not fit and only their {read} was" in result.stderr


def test_a_run_tells_what_a_budget_left_out(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("".join(f"q Q0 d{i} 1 1 x\n" for i in range(40)), "utf-8")
    (tmp_path / "q").write_text('{"id": "q", "text": "a"}\n', "utf-8")
    lines = [{"id": f"d{i}", "text": "a"} for i in range(40)]
    (tmp_path / "d").write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")
    files = ("--run", tmp_path / "r", "--queries", tmp_path / "q", "--documents", tmp_path / "d")
    command = ("score", "-m", bundle, "--backend", "fakes:plodding", *files, "--budget-ms", "1")
    result = qrank_(*command)
    assert len(result.stdout.splitlines()) == 40
    assert "of the 40 documents within the budget" in result.stderr


@pytest.mark.parametrize("identity", ["\ud800", True, None, 1.5, ["x"]])
def test_an_id_that_no_run_can_hold_is_one_line(bundle: Path, identity: object) -> None:
    stdin = json.dumps({"id": identity, "text": "a"})
    result = score(bundle, "--jsonl", "-f", "trec", stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith('qrank: error: "id" is ')
