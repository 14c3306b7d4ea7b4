"""The program of examples/c, built and run: the same logits and scores as in Python."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from qrank import Reranker
from qrank.bundle.locate import locate

EXAMPLE = Path(__file__).parent.parent / "examples" / "c"
INCLUDE = Path(os.environ.get("ORT_INCLUDE", "/usr/include/onnxruntime"))

PAIRS = [
    ("which planet is red?", "mars is the red planet"),
    ("which planet is red?", "how to bake bread"),
    ("ist das naïve [SEP] 火星?", "日本語 👩‍🚀 " * 20),
    ("", ""),
    ("word " * 600, "word " * 600),
]


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("make") is None, reason="no gcc")
@pytest.mark.skipif(
    not (INCLUDE / "onnxruntime_c_api.h").exists(),
    reason=f"no onnxruntime_c_api.h in {INCLUDE}; set ORT_INCLUDE",
)
def test_the_c_program_computes_what_python_computes(tmp_path: Path) -> None:
    package = find_spec("onnxruntime")
    assert package is not None
    libraries = [*Path(package.origin or "").parent.glob("capi/libonnxruntime.so.*")]
    if not libraries:
        pytest.skip("this build of onnxruntime has no library of its own")
    program, bundle = tmp_path / "score", locate("mini")
    build = ["make", "-C", str(EXAMPLE), f"OUT={program}", f"ORT_INCLUDE={INCLUDE}"]
    subprocess.run([*build, f"ORT_LIBRARY={libraries[0]}"], check=True)
    lines = "".join(f"{query}\t{document}\n" for query, document in PAIRS)
    command = [sys.executable, str(EXAMPLE / "ids.py"), str(bundle.folder)]
    with (tmp_path / "ids").open("w") as out:
        subprocess.run(command, input=lines, stdout=out, check=True, text=True, encoding="utf-8")
    graph = bundle.folder / "onnx-int8" / "model.onnx"
    done = subprocess.run([program, graph, tmp_path / "ids"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.array([line.split() for line in done.stdout.splitlines()], np.float64)
    with Reranker(bundle, backend="onnx", threads=1) as reranker:
        # One by one, like the program: int8 scales activations over a batch.
        scores = np.concatenate([reranker.score([pair]) for pair in PAIRS])
        logits = np.concatenate([reranker.score([pair], raw=True) for pair in PAIRS])
    np.testing.assert_allclose(found[:, 0], scores, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], logits, atol=1e-5)
