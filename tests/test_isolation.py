"""Native libraries that crash, hang or exit: the calling process survives and reports why."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import subset
from serving import process

from qrank import Reranker
from qrank.backends import Options, gguf, isolation, llama
from qrank.bundle.manifest import Manifest
from qrank.cli import main
from qrank.errors import InputError, TargetError
from qrank.measure.discover import Device
from qrank.measure.doctor import _device
from qrank.select import verify
from qrank.select.measurements import PROFILES, Measurement, remember
from qrank.select.targets import TargetKey
from qrank.system import machine, subprocess_rpc
from qrank.system.subprocess_rpc import Child, CrashError, HangError, NoChildError

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's"),
    pytest.mark.usefixtures("own_cache"),
]

FAILURES = {
    "CRASHES": "died (SIGSEGV)",
    "CRASHES_IN_THE_MIDDLE": "died (SIGSEGV)",
    "HANGS": "hung",
    "EXITS": "died (exit code 0)",
}
"""Name in `doubles` -> how its failure is reported."""

PATCH = """
import sys
import qrank.backends.{format} as real
import doubles
real.SPEC.open = doubles.{double}.open
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replace the backend of a format by a double in every Python process started from now on.

    Not in this process: what a test sees has run in a child process first, or not at all.
    """

    def install(format: str, double: str) -> None:
        site = tmp_path / "patched"
        site.mkdir()
        # Python imports a module with this name at startup.
        (site / "sitecustomize.py").write_text(PATCH.format(format=format, double=double), "utf-8")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(Path(__file__).parent)]))

    return install


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time out a hanging backend after 15 seconds."""
    monkeypatch.setattr(isolation, "limit", lambda backend, size, tokens, device: 15.0)


def qrank_(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("double", "how"), FAILURES.items())
def test_a_backend_that_fails_is_told_and_the_next_is_taken(
    onnx_only: Path,
    plug_in: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    double: str,
    how: str,
) -> None:
    plug_in(frail=f"doubles:{double}")
    reason = f"frail {how} computing int8 on this CPU"
    with pytest.raises(TargetError) as caught:
        Reranker(onnx_only, backend="frail")
    assert str(caught.value).startswith(reason)
    assert "RuntimeWarning" not in str(caught.value)
    # Measurements from a time when it still worked.
    measured = [
        Measurement(
            TargetKey("onnx-int8", "cpu", backend),
            speeds=dict.fromkeys(PROFILES, speed),
            kendall=1.0,
        )
        for backend, speed in (("frail", 9.0), (None, 1.0))
    ]
    remember(Manifest.load(onnx_only), machine.processors(), measured)
    with Reranker(onnx_only) as reranker:
        assert reranker.target.name == "onnx-int8@cpu"
    assert f"taking the next target: frail/onnx-int8@cpu: {reason}" in caplog.text
    result = qrank_("score", "-m", onnx_only, "-q", "a", "-f", "json", stdin="a\n")
    assert json.loads(result.stdout)["target"] == "onnx-int8@cpu"
    assert reason in result.stderr
    assert "qrank cache --clear proofs" in result.stderr


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("double", "how"), FAILURES.items())
def test_a_conversion_refuses_a_variant_that_kills_its_backend(
    bert: str, tmp_path: Path, broken: Callable[..., None], double: str, how: str
) -> None:
    broken("gguf", double)
    output = tmp_path / "out"
    result = qrank_("convert", bert, "--to", "gguf", "--precision", "q8_0", "-o", output)
    assert result.exit_code == 8
    assert f"llama.cpp {how} computing q8_0 on this CPU" in result.stderr
    assert not output.exists()


def test_a_server_starts_with_the_next_target(
    bundle: Path, tmp_path: Path, broken: Callable[..., None]
) -> None:
    folder = subset(bundle, tmp_path / "two", ["openvino-int8", "onnx-int8"])
    broken("openvino", "CRASHES_IN_THE_MIDDLE")
    said: list[str] = []
    with process(folder, said=said):
        pass
    assert any("taking the next target: openvino-int8@cpu: OpenVINO died" in line for line in said)
    assert any("is onnx-int8@cpu" in line for line in said)


def test_what_was_found_out_is_remembered_and_a_failure_for_a_day(
    bundle: Path, broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("openvino", "CRASHES")
    for again in ("", "So it was found less than a day ago"):
        with pytest.raises(TargetError, match=rf"OpenVINO died \(SIGSEGV\).*{again}"):
            Reranker(bundle, backend="openvino-int8")
        monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.undo()
    tomorrow = time.time() + verify._FAILURE_SECONDS
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    Reranker(bundle, backend="openvino-int8").close()


def no_process(*arguments: object, **named: object) -> None:
    raise AssertionError("a process was started")


@pytest.mark.parametrize("backend", ["openvino-fp16", "gguf-q8_0"])
def test_later_starts_pay_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    with Reranker(bundle, backend=backend) as reranker:
        expected = reranker.rank("a", ["b", "c d"])
        monkeypatch.setattr(subprocess, "Popen", no_process)
        reranker.close()
        assert reranker.rank("a", ["b", "c d"]) == expected
    with Reranker(bundle, backend=backend) as reranker:
        assert reranker.rank("a", ["b", "c d"]) == expected


def test_onnxruntime_on_the_cpu_is_proven_in_this_process(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", no_process)
    Reranker(bundle, backend="onnx-int8").close()
    assert not isolation.advised("onnx", "cpu")
    assert not isolation.advised("fakes:recording", "cuda")
    for backend, device in (("onnx", "cuda"), ("onnx", "coreml"), ("openvino", "npu")):
        assert isolation.advised(backend, device)


def test_a_frozen_application_goes_on_in_its_own_process(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    for backend in ("openvino-int8", "gguf-f16"):
        Reranker(bundle, backend=backend).close()


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python"])
def test_where_no_python_can_be_started_it_is_said_and_done_here(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, python: str
) -> None:
    """In uWSGI, for example, sys.executable is the server's own program."""
    monkeypatch.setattr(sys, "executable", python)
    Reranker(bundle, backend="openvino-fp16").close()
    (record,) = caplog.records
    assert "so openvino-fp16@cpu is tried in this one" in record.getMessage()


def test_llama_cpp_keeps_off_amx_and_the_doctor_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Sapphire Rapids, with the CPU flags that Linux reports for it."""
    asked: list[bool] = []
    real = llama.library().llama_model_load_from_file

    def recorded(path: bytes, settings: object) -> object:
        asked.append(settings.use_extra_bufts)  # type: ignore[attr-defined]
        return real(path, settings)

    monkeypatch.setattr(llama.library(), "llama_model_load_from_file", recorded)
    variant = Manifest.load(bundle).variants["gguf-q8_0"]
    flags = "fpu avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
    for found in (flags.replace("amx_int8", ""), flags):
        info = {"flags": found, "model name": "Xeon"}
        monkeypatch.setattr(machine, "_cpuinfo", lambda info=info: info)
        gguf.open(bundle, variant, "cpu", Options(1)).close()
    assert asked == [True, False]
    report = _device("gguf", Device("cpu", [None], [], gguf.SPEC.note("cpu")))
    assert report.computes
    assert "llama.cpp issue 20824" in report.detail


def test_a_shape_a_kernel_cannot_do_is_found_at_the_longest_probe(bundle: Path) -> None:
    """The probes checked at load include the longest one; kernels differ by length."""
    probes = Manifest.load(bundle).probes
    some = verify._some(probes)
    assert some.work.lengths.max() == probes.work.lengths.max()
    assert len(some.work) < len(probes.work)


# The child process


def slow_to_read() -> None:
    """A child that says hello but reads nothing."""
    print(subprocess_rpc._HELLO, flush=True)  # noqa: T201
    time.sleep(60)


def talks_and_ends() -> None:
    """A child that writes some lines and ends."""
    print(subprocess_rpc._HELLO, flush=True)  # noqa: T201
    sys.stdin.readline()
    for line in "abcd":
        print(line, file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(3)


def answers() -> None:
    """A child that works properly."""

    def refuse(kind: str) -> dict[str, object]:
        raise {"input": InputError, "key": KeyError}[kind]("no")

    subprocess_rpc.answer({"pid": lambda: {"pid": os.getpid()}, "refuse": refuse, "hang": hang})


def hang() -> dict[str, object]:
    while True:
        time.sleep(60)


def started(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Child:
    """A child that runs a function of this file."""
    code = f"import {__name__} as here; here.{main.__name__}()"
    monkeypatch.setattr(subprocess_rpc, "_BOOTSTRAP", code)
    return Child(__name__)


def test_a_child_that_does_not_read_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is larger than the pipe's buffer of 64 KiB."""
    asked = started(slow_to_read, monkeypatch)
    begun = time.perf_counter()
    with pytest.raises(HangError, match="no answer within 3 s"):
        asked.ask({"do": "x", "texts": "x" * 10**6}, 3.0)
    assert time.perf_counter() - begun < 9


def test_the_last_lines_of_a_child_are_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = started(talks_and_ends, monkeypatch)
    with pytest.raises(CrashError, match=r"its process died \(exit code 3\): b / c / d$"):
        asked.ask({"do": "x"}, 30.0)


def test_a_childs_errors_are_raised_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(answers, monkeypatch) as asked:
        with pytest.raises(InputError, match=r"^no$"):
            asked.ask({"do": "refuse", "kind": "input"}, 30.0)
        with pytest.raises(TargetError, match=r"^KeyError: 'no'$"):
            asked.ask({"do": "refuse", "kind": "key"}, 30.0)
        assert asked.ask({"do": "pid"}, 30.0)["pid"] != os.getpid()


def test_a_child_that_hangs_ends_with_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the parent is ended by SIGKILL and cannot clean up."""
    code = (
        "import sys\n"
        "from qrank.system import subprocess_rpc\n"
        f"subprocess_rpc._BOOTSTRAP = 'import {__name__} as here; here.answers()'\n"
        "asked = subprocess_rpc.Child('x')\n"
        "print(asked.ask({'do': 'pid'}, 60)['pid'], flush=True)\n"
        "asked.ask({'do': 'hang'}, 60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_no_python_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(NoChildError, match="does not start as Python"):
        Child("qrank.backends.isolation").greeted()
