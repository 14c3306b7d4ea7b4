"""`--exporter optimum`: optimum-intel's graphs are imported and proven like any other.

What needs optimum-intel runs by `make optimum`, in an environment of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_decoders
from click.testing import CliRunner
from tiny_chains import ETTIN, chain

from qrank import Reranker
from qrank.bundle.manifest import Manifest
from qrank.cli import main
from qrank.converters.convert import Converted, convert
from qrank.errors import ConversionError, MissingExtraError
from qrank.system.extras import installed

there = installed("optimum.intel")
needs_optimum = pytest.mark.skipif(not there, reason="optimum-intel is not installed")

DOCUMENTS = ["Mars is red.", "bread", "", "planets and " * 40]


def exported(folder: Path, output: Path, precision: str | None = None, kind: str = "") -> Converted:
    family = tiny_decoders.FAMILIES.get(kind)
    request = [("openvino", precision)]
    return convert(str(folder), request, output, family=family, exporter="optimum")


@needs_optimum
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("bert", "int8"),
        ("bert", "fp16"),
        ("xlm-roberta", "int8"),
        ("deberta-v2", "int8"),
        ("qwen3", "int8"),
        ("qwen3", "fp16"),
        ("qwen3-seq-cls", "int8"),
    ],
)
def test_its_graph_is_proven_and_scores_as_the_original(
    kind: str, precision: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint_of(kind)
    made = exported(folder, tmp_path / "bundle", precision, kind)
    variant = made.manifest.variants[f"openvino-{precision}"]
    version = metadata.version("optimum-intel")
    assert variant.note.startswith(f"exported by optimum-intel {version}")
    assert version in variant.tools.values()
    assert made.manifest.probes.verified
    with Reranker(made.folder) as ours:
        found = ours.score([("which planet is red?", d) for d in DOCUMENTS], raw=True)
    with Reranker(folder, backend="torch", family=tiny_decoders.FAMILIES.get(kind)) as original:
        expected = original.score([("which planet is red?", d) for d in DOCUMENTS], raw=True)
    np.testing.assert_allclose(found, expected, atol=0.1 * float(np.ptp(expected)))


@needs_optimum
@pytest.mark.parametrize("kind", ["modernbert-mean", "bert-one-segment"])
def test_what_it_cannot_export_is_said(
    kind: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """It knows no ModernBERT, and traces BERT with the second of one token types."""
    with pytest.raises(
        ConversionError, match=r"optimum-intel cannot export tiny; leave --exporter"
    ):
        exported(checkpoint_of(kind), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@needs_optimum
def test_a_checkpoint_that_is_read_as_another_class_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = chain(checkpoint_of("modernbert-mean"), tmp_path / "ettin", ETTIN).folder
    with pytest.raises(ConversionError, match=r"read as ModernBertForSequenceClassification"):
        exported(folder, tmp_path / "bundle")


@needs_optimum
def test_other_precisions_and_windows_are_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="makes int8 and fp16; for int8-w8a8, leave"):
        exported(checkpoint_of("bert"), tmp_path / "bundle", "int8-w8a8")
    folder = Path(shutil.copytree(checkpoint_of("qwen3"), tmp_path / "qwen3"))
    tiny.edit_config(folder, use_sliding_window=True, sliding_window=64, layer_types=None)
    tiny.edit_config(folder, max_window_layers=0)
    with pytest.raises(ConversionError, match=r"sliding_window = 64: whether optimum-intel's"):
        exported(folder, tmp_path / "bundle", kind="qwen3")


@needs_optimum
def test_the_command_and_a_bundle_that_has_the_variant(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    line = ["convert", str(checkpoint_of("bert")), "--exporter", "optimum", "-o", str(bundle)]
    for _ in range(2):  # The second finds everything there.
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 0, done.output
        assert "openvino-int8" in done.output
    assert "export=True" not in capfd.readouterr().err  # of optimum-intel's own messages
    assert list(Manifest.load(bundle).variants) == ["openvino-int8"]
    manifest = Manifest.load(bundle)
    ours = replace(manifest.variants["openvino-int8"], note="")
    replace(manifest, variants={ours.name: ours}).save(bundle)
    done = CliRunner().invoke(main, line)
    assert done.exit_code == ConversionError.exit_code
    assert "already has openvino-int8, not made by optimum; name another folder" in done.stderr


@pytest.mark.skipif(there, reason="optimum-intel is installed")
def test_a_missing_package_is_named(bert: str, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r'optimum.* pip install "qrank\[optimum\]"'):
        convert(bert, None, tmp_path / "bundle", exporter="optimum")


@pytest.mark.parametrize(
    ("formats", "exporter", "message"),
    [
        (None, "other", "there is no exporter 'other'; there are: optimum"),
        ("onnx", "optimum", "the exporter optimum writes openvino and not onnx"),
    ],
)
def test_an_exporter_is_one_of_the_format(
    formats: str | None, exporter: str, message: str, bert: str, tmp_path: Path
) -> None:
    asked = None if formats is None else [(formats, None)]
    with pytest.raises(ConversionError, match=message):
        convert(bert, asked, tmp_path / "bundle", exporter=exporter)


def test_a_prebuilt_file_is_not_exported(tmp_path: Path) -> None:
    (graph := tmp_path / "model.xml").touch()
    with pytest.raises(ConversionError, match=r"--exporter converts a checkpoint; .* is prebuilt"):
        convert(str(graph), None, tmp_path / "bundle", exporter="optimum")
