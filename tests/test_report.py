"""`qrank doctor --report FILE`: every target's result, and nothing about the person who made it."""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import subset

from qrank.bundle.manifest import Manifest
from qrank.cli import main
from qrank.measure.report import TargetReport
from qrank.select.measurements import PROFILES, Measurement, remember
from qrank.select.targets import TargetKey
from qrank.system import extras, machine

PlugIn = Callable[..., None]


def qrank_(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _few_backends(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only onnx and openvino seem to be installed: the others take seconds to look at."""
    there = extras.installed
    monkeypatch.setattr(
        "qrank.backends.contract.installed",
        lambda module: module not in ("llama_cpp", "torch", "transformers") and there(module),
    )


def test_a_report_has_every_target_and_no_names(
    bundle: Path, tmp_path: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(wrong="doubles:WRONG", talks="doubles:TALKS")
    monkeypatch.setenv("HOME", "/home/alice smith")
    monkeypatch.setenv("LOGNAME", "asmith")
    folder = subset(bundle, tmp_path / "two", ["onnx-int8", "openvino-int8"])
    manifest = Manifest.load(folder)
    speeds: dict[str, float] = dict.fromkeys(map(str, PROFILES), 7.0)
    measured = Measurement(TargetKey("onnx-int8", "cpu"), speeds=speeds, threads=2)
    monkeypatch.setattr(machine, "processors", lambda: 2)
    remember(manifest, 2, [measured])

    result = qrank_("doctor", "--report", tmp_path / "report.json", "-m", folder)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    text = (tmp_path / "report.json").read_text("utf-8")
    report = json.loads(text)
    found = {
        (each["target"], each["compute_dtype"]): TargetReport(**each) for each in report["targets"]
    }

    onnx = found["onnx-int8@cpu", None]
    assert (onnx.result, onnx.reason, onnx.speeds) == ("conforms", None, speeds)
    assert onnx.max_abs == pytest.approx(manifest.variants["onnx-int8"].fidelity.max_abs, abs=0.01)
    assert onnx.kendall == pytest.approx(manifest.variants["onnx-int8"].fidelity.kendall, abs=0.01)
    assert onnx.load is not None
    assert onnx.max_abs is not None
    assert onnx.allowed is not None
    assert onnx.max_abs < onnx.allowed
    openvino = found["openvino-int8@cpu", "fp32"]
    assert (openvino.result, openvino.speeds) == ("conforms", {})
    assert str(openvino.runtime).startswith("openvino ")
    for name in ("onnx-int8@cuda", "openvino-int8@npu"):
        assert found[name, None].result == "absent"
    wrong = found["wrong/onnx-int8@cpu", None]
    assert wrong.result == "fails"
    assert "computes wrongly" in str(wrong.reason)

    talks = str(found["talks/onnx-int8@cpu", None].reason)
    assert "gpu.so" in talks
    assert "vendor.so" in talks
    assert f"@{platform.node()}" not in talks
    for name in ("alice", "smith", str(tmp_path), "/opt"):
        assert name not in text
    assert report["machine"]["cpu"] == machine.cpu_name()
    assert report["model"] == {"name": manifest.name, "digest": manifest.digest, "probes": 44}
    assert any(each.startswith("onnxruntime-") for each in report["packages"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "nowhere/report.json"], "no folder nowhere"),
        (["--report", "r.json", "--json"], "leave out --json"),
        (["--tune"], "are for --report"),
        (["--report", "r.json", "-m", "nothing"], "no model 'nothing'"),
    ],
)
def test_what_cannot_be_reported_is_told_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = qrank_("doctor", *arguments)
    assert result.exit_code != 0
    assert message in result.stderr
    assert not (tmp_path / "r.json").exists()
