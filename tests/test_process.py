"""The command line as a process: closed or full streams, signals, options given twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from commands import qrank_, score, shell

from qrank import errors
from qrank.cli import main
from qrank.cli.common import FiniteFloat, FiniteRange, InputFile

SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}

COMMANDS = [name for name, command in main.commands.items() if not isinstance(command, click.Group)]
OPTIONS = [
    (name, option)
    for name in COMMANDS
    for option in main.commands[name].params
    if isinstance(option, click.Option)
]


def ids(options: list[tuple[str, click.Option]]) -> list[str]:
    return [f"{name} {option.opts[0]}" for name, option in options]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_text("a\na a\n", "utf-8")
    return path


def once(option: click.Option) -> list[str]:
    """An option with an arbitrary value."""
    name = max(option.opts, key=len)
    if option.is_flag:
        return [name]
    value = option.type.choices[0] if isinstance(option.type, click.Choice) else "1"
    return [name, *[value] * option.nargs]


SINGLE = [(name, o) for name, o in OPTIONS if not (o.multiple or o.count)]


@pytest.mark.parametrize(("command", "option"), SINGLE, ids=ids(SINGLE))
def test_an_option_given_twice_counts_twice_or_is_refused(
    command: str, option: click.Option
) -> None:
    result = qrank_(command, *once(option), *once(option))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: {max(option.opts, key=len)} is given twice" in result.stderr


def test_by_its_other_name_and_its_opposite_it_is_the_same_option(documents: Path) -> None:
    for twice in (["-k", "3", "--top-k=5"], ["-k3", "-k5"], ["--measure", "--no-measure"]):
        result = qrank_("score", "-q", "x", documents, *twice)
        assert result.exit_code == 2
        assert "is given twice" in result.stderr
    assert "--debug is given twice" in qrank_("--debug", "--debug", "models").stderr
    assert qrank_("score", "--help", "--help").exit_code == 0


NUMBERS = [(name, o) for name, o in OPTIONS if isinstance(o.type, click.types.FloatParamType)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=ids(NUMBERS))
def test_a_number_is_finite(command: str, option: click.Option, value: str) -> None:
    result = qrank_(command, f"{option.opts[0]}={value}")
    assert result.exit_code == 2
    assert f"Invalid value for '{option.opts[0]}" in result.stderr
    assert isinstance(option.type, FiniteFloat | FiniteRange)


def test_whatever_is_read_as_text_is_read_by_the_same_reader() -> None:
    """Except TLS files, which Python's ssl reads; `test_textfiles` covers the API key file."""
    others = {
        f"{name} {parameter.opts[0]}"
        for name in COMMANDS
        for parameter in main.commands[name].params
        if isinstance(parameter.type, click.File)
        or (
            isinstance(parameter.type, click.Path)
            and parameter.type.exists
            and parameter.type.file_okay
            and not isinstance(parameter.type, InputFile)
        )
    }
    assert others == {"serve --api-key-file", "serve --tls-cert", "serve --tls-key"}


@pytest.fixture
def handlers() -> Iterator[None]:
    """Check that a command leaves the process's signal handlers unchanged."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    yield
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}


SIGNALLED = """
import signal, sys
from qrank import Reranker
from qrank.cli import main
name = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
before = handlers()
Reranker.rank = lambda *arguments, **options: signal.raise_signal(getattr(signal, name))
try:
    main()
finally:
    assert handlers() == before
"""


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_a_command_in_one_line(bundle: Path, documents: Path, name: str) -> None:
    """In a process of its own, as a shell starts it."""
    command: list[str | Path] = [sys.executable, "-c", SIGNALLED, name]
    command += ["score", "-m", bundle, "-q", "a", documents]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", f"qrank: {SIGNALS[name]}\n")
    assert done.returncode == 128 + getattr(signal, name)


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_ignored_stays_ignored(bundle: Path, documents: Path) -> None:
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert score(bundle, documents).exit_code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("name", ["SIGTERM"])
def test_a_conversion_that_is_stopped_leaves_nothing(
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    from qrank.converters.onnx import export

    def convert(checkpoint: object, precision: str, folder: Path, *more: object) -> str:
        (folder / "half-written.onnx").write_bytes(b"half")
        signal.raise_signal(getattr(signal, name))  # comes before the next line
        return ""

    monkeypatch.setattr(export, "convert", convert)
    command = ("convert", checkpoint_of("bert"), "--to", "onnx", "-o", tmp_path / "out")
    result = qrank_(*command)
    assert result.exit_code == 128 + getattr(signal, name), result.stderr
    assert result.stderr.splitlines()[-1] == f"qrank: {SIGNALS[name]}"
    assert list(tmp_path.iterdir()) == []


def waiting(*command: str | Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a command, wait until it has child processes, and return all of them."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qrank", *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    places = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children: list[int] = []
    while process.poll() is None and not children:
        time.sleep(0.005)
        children = [int(number) for number in places.read_text("ascii").split()]
    return process, children


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_command_that_is_stopped_leaves_no_child(onnx_only: Path, name: str) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc here")
    process, children = waiting("tune", onnx_only)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert children
    assert (process.returncode, out) == (128 + getattr(signal, name), ""), err
    assert err == f"qrank: {SIGNALS[name]}\n"
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_ctrl_c_ends_a_loop_of_the_shell() -> None:
    """Bash continues after exit code 130; the loop ends only if the signal killed the process."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    child, terminal = pty.fork()
    if child == 0:
        loop = f"for i in 1 2; do '{sys.executable}' -m qrank score -q a -; done; echo ended"
        os.execvp("bash", ["bash", "-c", loop])
    shown = b""
    while block := _written(terminal):
        if b"no --model given" not in shown and b"no --model given" in shown + block:
            os.write(terminal, b"\x03")
        shown += block
    os.close(terminal)
    os.waitpid(child, 0)
    assert b"ended" not in shown
    assert shown.count(b"qrank: interrupted") == 1
    assert b"Traceback" not in shown


def _written(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # on Linux: the other end is closed
        return b""


def test_ctrl_c_while_it_is_imported_is_one_line() -> None:
    code = (
        "import sys, qrank.__main__ as m\n"
        "class Finder:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'rich': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "qrank: interrupted\n")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "qrank", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].endswith("-m qrank [OPTIONS] COMMAND [ARGS]...")


CLOSED = [
    # The result cannot be written.
    ("qrank models >&-", 1, "standard output: it is closed"),
    ("qrank --help >&-", 1, "standard output: it is closed"),
    ("qrank --help > /dev/full", 1, "standard output: No space left"),
    # The reader has closed the pipe.
    ("qrank --help | true; exit ${PIPESTATUS[0]}", 141, ""),
    # Only messages are lost, not the result.
    ("qrank score -m $BUNDLE -q a --max-length 10 $DOCUMENTS 2>&-", 0, ""),
    ("qrank score -m $BUNDLE -q a --max-length 10 $DOCUMENTS 2> /dev/full", 0, ""),
    ("qrank score -m $BUNDLE -q a - <&-", 2, "standard input is closed"),
]


@pytest.mark.parametrize(("command", "code", "message"), CLOSED)
def test_a_stream_that_is_closed_or_full_is_a_line_and_an_exit_code(
    bundle: Path, documents: Path, command: str, code: int, message: str
) -> None:
    documents.write_text("a a a a a a a a a a\na\n", "utf-8")
    done = shell(command.replace("$DOCUMENTS", f"'{documents}'"), bundle)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (1 if message else 0), done.stderr
    assert message in done.stderr
    if code == 0:
        assert len(done.stdout.splitlines()) == 2


WITHOUT_STREAMS = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
import qrank.measure.tuning
from qrank.__main__ import main
qrank.measure.tuning.tune = lambda *bundle, **how: []  # takes long, and is not what is tried
try:
    main()
except SystemExit as end:
    held = {os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)}
    with open(os.environ["FOUND"], "w") as file:
        file.write(f"{end.code} {held}")
"""


@pytest.mark.parametrize(("command", "code"), [("tune", 0), ("inspect", 1)])
def test_what_is_run_for_more_than_its_output_needs_none(
    bundle: Path, tmp_path: Path, command: str, code: int
) -> None:
    """As under cron and supervisors; no file may get the descriptor of a closed stream."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    found = tmp_path / "found"
    environment = {**os.environ, "FOUND": str(found)}
    subprocess.run([sys.executable, "-c", WITHOUT_STREAMS, command, bundle], env=environment)
    assert found.read_text("utf-8") == f"{code} {{'/dev/null'}}"


def test_the_exit_codes_of_signals_are_in_the_help() -> None:
    described = " ".join(qrank_("--help").stdout.partition("Exit codes:")[2].split())
    for code in (129, 130, 141, 143):
        assert f"{code} " in described
    assert not {129, 130, 141, 143} & {getattr(errors, n).exit_code for n in errors.__all__}


STEPS = """
import time
from qrank.cli.spinner import spinner
from qrank.system.steps import Step
with spinner() as show:
    show("reading [the model]")
    time.sleep(0.2)
    for done in range(3):
        show(Step("making", done, 3))
        time.sleep(0.4)
"""


def test_a_spinner_shows_the_step_its_number_and_the_time_left(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, b"")
    assert "reading [the model] 0:00:00" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "making (2 of 3)" in plain
    assert "making (3 of 3)" in plain
    assert re.search(r"about 0:0\d left", plain)
    piped = subprocess.run(command, capture_output=True, env=environment)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, b"", b"")


def test_messages_stand_above_the_bar(bundle: Path, tmp_path: Path) -> None:
    """A progress bar is redrawn on one line; other messages must not end up in it."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    queries = [{"id": f"q{i}", "text": "a " * (400 if i == 5 else 1)} for i in range(9)]
    (tmp_path / "q").write_text("".join(json.dumps(q) + "\n" for q in queries), "utf-8")
    (tmp_path / "d").write_text('{"id": "d", "text": "a"}\n', "utf-8")
    (tmp_path / "r").write_text("".join(f"q{i} Q0 d 1 1 x\n" for i in range(9)), "utf-8")
    ours, theirs = pty.openpty()
    command: list[str | Path] = [sys.executable, "-m", "qrank", "score", "-m", bundle]
    command += ["--backend", "fakes:length"]
    for option, name in (("--run", "r"), ("--queries", "q"), ("--documents", "d")):
        command += [option, tmp_path / name]
    environment: dict[str, Any] = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    environment["PYTHONPATH"] = Path(__file__).parent
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert len(done.stdout.splitlines()) == 9
    notice = shown.index("qrank: the query has 400 tokens")
    assert re.search(r"9/9.* \d+\.\d/s", shown)
    # Its line was cleared, and the cursor is at the start of the line.
    assert shown[:notice].endswith("\r\x1b[2K")
