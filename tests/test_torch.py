"""Unconverted checkpoints: `backend="torch"`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from qrank import Reranker
from qrank.backends import Options
from qrank.backends import torch as backend
from qrank.bundle.manifest import Manifest
from qrank.cli import main
from qrank.errors import FamilyError, ModelNotFoundError, TargetError

QUERY = "which planet is red?"
DOCUMENTS = ["mars is red", "bread", "", "the red planet is mars " * 80]


@pytest.fixture(scope="module")
def bert(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("bert")


def test_it_gives_the_probes_their_logits(bert: Path, bundle: Path) -> None:
    """The probes' logits were computed pair by pair with another attention implementation."""
    probes = Manifest.load(bundle).probes
    original, _ = backend.as_bundle(str(bert))
    variant = original.manifest.variants["torch-fp32"]
    options = Options(2, family=original.manifest.family)
    opened = backend.open(original.folder, variant, "cpu", options)
    np.testing.assert_allclose(opened.logits(probes.work), probes.logits, atol=1e-4)
    opened.close()


def test_it_ranks_as_the_bundle_does(bert: Path, bundle: Path) -> None:
    with Reranker(bert, backend="torch") as original, Reranker(bundle, backend="onnx-fp32") as ours:
        assert original.target.name == "torch-fp32@cpu"
        theirs = original.rank(QUERY, DOCUMENTS)
        for a, b in zip(theirs, ours.rank(QUERY, DOCUMENTS), strict=True):
            assert (a.index, a.truncated) == (b.index, b.truncated)
            assert abs(a.score - b.score) < 1e-4


@pytest.mark.parametrize(("precision", "far"), [("fp16", 0.1), ("bf16", 1.0)])
def test_a_precision_can_be_named(bert: Path, precision: str, far: float) -> None:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    with (
        Reranker(bert, backend=f"torch-{precision}") as half,
        Reranker(bert, backend="torch") as full,
    ):
        assert half.target.name == f"torch-{precision}@cpu"
        difference = np.abs(half.score(pairs, raw=True) - full.score(pairs, raw=True)).max()
    assert 0 < difference < far


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.92 GB, max allowed: 18 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["cuda", "mps", "cpu"],
)
def test_where_memory_does_not_suffice_smaller_batches_give_the_same(
    bert: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    forward = transformers.BertModel.forward
    room = 10**6
    tried: list[int] = []

    def limited(self: object, input_ids: torch.Tensor, *rest: object, **more: object) -> object:
        tried.append(input_ids.numel())
        if tried[-1] > room:
            raise error
        return forward(self, input_ids, *rest, **more)

    monkeypatch.setattr(transformers.BertModel, "forward", limited)
    pairs = [(QUERY, document) for document in [*DOCUMENTS, *DOCUMENTS]]
    with Reranker(bert, backend="torch") as reranker:
        expected = reranker.score(pairs, raw=True)
        room = 200
        np.testing.assert_allclose(reranker.score(pairs, raw=True), expected, atol=1e-4)
        assert max(tried) > 200
        room = 100
        with pytest.raises(TargetError, match=r"a single pair of 160 tokens: .*memory.*--max-len"):
            reranker.rank(QUERY, DOCUMENTS)
        assert len(reranker.rank(QUERY, DOCUMENTS[:2])) == 2


def test_from_the_command_line(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("mars is red\nbread\n", "utf-8")
    command = ["score", "-q", QUERY, "-m", str(bert), str(tmp_path / "d.txt")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 4
    assert "convert it first" in refused.stderr
    assert "--backend torch" in refused.stderr
    result = CliRunner().invoke(main, [*command, "--backend", "torch", "-f", "json"])
    assert result.exit_code == 0, result.stderr
    assert '"target": "torch-fp32@cpu"' in result.stdout


def test_what_it_cannot_run_is_told(bundle: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is a bundle already"):
        Reranker(bundle, backend="torch")
    with pytest.raises(TargetError, match="no variant for backend 'torch-int8'; it has: "):
        Reranker(bert, backend="torch-int8")
    absent = next(d for d in ("cuda", "mps") if d not in backend.devices())
    with pytest.raises(TargetError, match=f"no device '{absent}'; present are: cpu"):
        Reranker(bert, backend="torch", device=absent)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}', "utf-8")
    with pytest.raises(FamilyError, match="names the architecture Other"):
        Reranker(tmp_path, backend="torch")
