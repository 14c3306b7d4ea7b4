"""The documentation matches what the backends declare, and what was reported."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from tables import TABLES, unverified, verified_table

from qrank.backends import formats, spec
from qrank.cli import main
from qrank.measure.report import SCHEMA, TargetReport

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_as_generated(name: str) -> None:
    path, made = TABLES[name]
    table = "\n".join(["", *made(), "", ""])
    assert table in (ROOT / path).read_text("utf-8"), f"see `python tests/tables.py`:{table}"


def test_only_reports_verify_a_target(tmp_path: Path) -> None:
    assert "- `onnx` on `cpu`: any precision" in unverified(tmp_path)
    assert len(verified_table(tmp_path)) == 2
    targets = [
        TargetReport("onnx-int8@cpu", "fails", "computes wrongly", runtime="onnxruntime 1.32.0"),
        TargetReport("onnx-int8@cuda", "absent", "no such device"),
        TargetReport("openvino-fp16@gpu", "conforms", None, "fp16", "openvino 1", 0.001, 0.03, 1.0),
    ]
    report = {
        "schema": SCHEMA,
        "date": "2026-12-01",
        "machine": {"system": "Linux 6.1 aarch64", "cpu": "some CPU", "instruction_sets": []},
        "model": {"name": "mini"},
        "targets": [asdict(target) for target in targets],
    }
    (tmp_path / "one.json").write_text(json.dumps(report), "utf-8")
    first, second = verified_table(tmp_path)[2:]
    assert "fails: computes wrongly" in first
    assert "`openvino-fp16@gpu` | fp16 | 0.001 | 0.03 | 1.000 | some CPU, Linux aarch64" in second
    report["machine"] |= {"emulator": "qemu 10.0"}  # type: ignore[operator]
    (tmp_path / "one.json").write_text(json.dumps(report), "utf-8")
    assert "| some CPU, Linux aarch64, emulated by qemu 10.0 |" in verified_table(tmp_path)[3]
    left = unverified(tmp_path)
    assert "- `onnx` on `cuda`: any precision" in left
    assert "- `openvino` on `gpu`: `int8`, `int8-w8a8`, `int4`" in left
    assert not any(line.startswith("- `onnx` on `cpu`") and "`int8`" in line for line in left)


@pytest.mark.parametrize("command", ["score", "serve", "eval"])
def test_help_names_every_kind_of_device(command: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    for name in formats():
        for kind in spec(name).kinds:
            assert kind in text.partition("--device")[2].partition("--")[0]


def test_help_names_every_format_and_precision() -> None:
    text = " ".join(CliRunner().invoke(main, ["convert", "--help"]).output.split())
    assert f"[{'|'.join(formats())}]" in text
    for name, format in formats().items():
        assert f"{name}: {', '.join(format.made)}" in text
