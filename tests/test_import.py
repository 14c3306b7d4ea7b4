"""Which modules are loaded when, and what happens if a package is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qrank.backends import BACKENDS

HEAVY = [
    *("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "llama_cpp", "gguf"),
    *("huggingface_hub", "scipy", "bm25s", "ir_measures", "matplotlib"),
]


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def loaded(code: str, *arguments: str | Path) -> set[str]:
    """The modules of HEAVY that are loaded after running some code."""
    ending = f"\nimport json, sys\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = python(code + ending, *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        *("qrank", "qrank.cli", "qrank.quality.rerank_run", "qrank.backends"),
        *(f"qrank.backends.{name}" for name in BACKENDS),
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    assert loaded(f"import {module}") == set()


def test_scoring_loads_the_runtime_of_its_backend_only(bundle: Path) -> None:
    code = (
        "import sys\nfrom qrank import Reranker\n"
        "Reranker(sys.argv[1], backend='onnx').rank('which planet is red?', ['mars', 'bread'])"
    )
    assert loaded(code, bundle) == {"onnxruntime"}


def test_onnxruntime_is_kept_from_calling_home(bundle: Path) -> None:
    """Since 1.29, it reports usage from a thread that starts on import."""
    code = (
        "import os, sys\nfrom qrank import Reranker\nReranker(sys.argv[1], backend='onnx')\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    )
    assert loaded(code, bundle) == {"onnxruntime"}


# None in sys.modules makes an import fail, as if the package were not installed.
WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from qrank.cli import main
main(sys.argv[2:])
"""


def test_scoring_without_onnxruntime_says_what_to_install(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("mars\n", "utf-8")
    arguments = ("score", "-q", "x", "-m", bundle, "--backend", "onnx", tmp_path / "d.txt")
    done = python(WITHOUT, "onnxruntime", *arguments)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("qrank: error: onnxruntime is not installed")
    assert line.endswith('install it with: pip install "qrank[onnx]"')


def test_the_error_is_an_import_error_with_the_line(bundle: Path) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
from qrank import QrankError, Reranker
from qrank.errors import MissingExtraError
try:
    Reranker(sys.argv[1], backend="onnx")
except MissingExtraError as error:
    assert isinstance(error, ImportError) and isinstance(error, QrankError)
    assert 'pip install "qrank[onnx]"' in str(error)
    print("caught")
"""
    done = python(code, bundle)
    assert done.stdout == "caught\n", done.stderr


@pytest.mark.parametrize("missing", ["torch", "transformers", "onnxscript", "safetensors"])
def test_converting_without_its_packages_says_what_to_install(tmp_path: Path, missing: str) -> None:
    """With --to, a missing package is an error; without, no format is left to convert to."""
    (tmp_path / "config.json").write_text("{}", "utf-8")
    # Without onnxscript the other formats can still be made.
    for more in ([], ["--to", "onnx"]) if missing != "onnxscript" else (["--to", "onnx"],):
        done = python(WITHOUT, missing, "convert", tmp_path, "-o", tmp_path / "out", *more)
        assert done.returncode == 3, done.stderr
        assert 'pip install "qrank[convert]"' in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["models", "--help", "--version"])
def test_what_needs_no_backend_works_without_one(command: str) -> None:
    assert python(WITHOUT, "onnxruntime", command).returncode == 0


def test_inspecting_needs_no_backend(bundle: Path) -> None:
    assert python(WITHOUT, "onnxruntime", "inspect", bundle, "--verify").returncode == 0


def test_the_module_variable_is_the_users(bundle: Path) -> None:
    """A value that the user has set is kept, so onnxruntime's reports can be enabled."""
    code = "import os\nfrom qrank.system.extras import need\nneed('onnxruntime', extra='onnx')\n"
    code += "assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment)
    assert done.returncode == 0


def test_a_checkpoint_without_torch_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("mars\n", "utf-8")
    command = ("score", "-q", "x", "-m", tmp_path, "--backend", "torch", tmp_path / "d.txt")
    done = python(WITHOUT, "torch", *command)
    assert done.returncode == 3
    assert done.stderr.rstrip().endswith('install it with: pip install "qrank[torch]"')


@pytest.mark.parametrize(("format", "package"), [("gguf", "llama_cpp"), ("openvino", "openvino")])
def test_a_format_without_its_package_says_what_to_install(
    bundle: Path, tmp_path: Path, format: str, package: str
) -> None:
    (tmp_path / "d.txt").write_text("mars\n", "utf-8")
    command = ("score", "-q", "x", "-m", bundle, "--backend", format, tmp_path / "d.txt")
    done = python(WITHOUT, package, *command)
    assert done.returncode == 3
    assert done.stderr.rstrip().endswith(f'install it with: pip install "qrank[{format}]"')
