"""Files that somebody converted already: they become bundles that score as transformers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import ready_files
import test_conformance
import test_decoders
import tiny
import tiny_decoders
from click.testing import CliRunner

from qrank import Reranker
from qrank.bundle import TOKENIZER, Manifest
from qrank.cli import main
from qrank.converters.convert import convert
from qrank.encoding import Encoder
from qrank.errors import ConversionError, FidelityError, ModelNotFoundError, QrankError
from qrank.fidelity import TOLERANCES, Fidelity
from qrank.work import Ids, Logits

Folders = Callable[[str], Path]
TYPES = ["input_ids", "attention_mask", "token_type_ids"]
POSITIONS = ["input_ids", "attention_mask", "position_ids"]


def quantized(checkpoint: Path, target: Path) -> None:
    """One graph four times in one folder, as Xenova's repositories have it."""
    source = ready_files.onnx_causal(checkpoint, target) / "onnx" / "model.onnx"
    ready_files.onnx_int8(source, source.with_name("model_quantized.onnx"))
    ready_files.onnx_int4(source, source.with_name("model_q4.onnx"))
    ready_files.onnx_fp16(source, source.with_name("model_fp16.onnx"))


def both(checkpoint: Path, target: Path, names: list[str]) -> None:
    """One graph in two formats, in int8 where it is OpenVINO's."""
    ready_files.onnx_classifier(checkpoint, target, names)
    ready_files.openvino_from_onnx(target, int8=True)


def whole(checkpoint: Path, target: Path) -> None:
    """A causal model without a cache, in two formats."""
    ready_files.onnx_causal(checkpoint, target, cache=False)
    ready_files.openvino_from_onnx(target)


LAYOUTS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "state": ("qwen3", lambda c, t: ready_files.openvino_causal(c, t, int8=True)),
    "inputs": ("gemma", lambda c, t: ready_files.openvino_causal(c, t, stateful=False)),
    "whole": ("qwen3", whole),
    "xenova": ("zerank", quantized),
    "pooled": ("qwen3-seq-cls", lambda c, t: both(c, t, POSITIONS)),
    "types": ("bert", lambda c, t: both(c, t, TYPES)),
    "positions": ("xlm-roberta", lambda c, t: both(c, t, POSITIONS)),
}
"""What stands in a folder: of which checkpoint, and who writes it."""

ROWS = [
    ("state", "", "openvino-int8"),
    ("inputs", "", "openvino-fp32"),
    ("whole", "openvino_model.xml", "openvino-fp32"),
    ("whole", "onnx/model.onnx", "onnx-fp32"),
    ("xenova", "", "onnx-int8"),
    ("xenova", "onnx/model_q4.onnx", "onnx-int4"),
    ("xenova", "onnx/model_fp16.onnx", "onnx-fp16"),
    ("xenova", "onnx/model.onnx", "onnx-fp32"),
    ("pooled", "openvino_model.xml", "openvino-int8"),
    ("pooled", "onnx", "onnx-fp32"),
    ("types", "openvino_model.xml", "openvino-int8"),
    ("types", "onnx/model.onnx", "onnx-fp32"),
    ("positions", "openvino_model.xml", "openvino-int8"),
    ("positions", "onnx/model.onnx", "onnx-fp32"),
]
"""A layout, the file in it that is the source (the folder where none is named), what it becomes."""


@pytest.fixture(scope="session")
def layout_of(
    checkpoint_of: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A layout's folder, made when first asked for. Read only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            kind, make = LAYOUTS[name]
            made[name] = tmp_path_factory.mktemp(name) / f"their-{kind}"
            make(checkpoint_of(kind), made[name])
        return made[name]

    return get


def family_of(layout: str) -> str | None:
    return tiny_decoders.FAMILIES.get(LAYOUTS[layout][0])


def expected(layout: str, checkpoint_of: Folders) -> tuple[list[tuple[str, str]], Logits]:
    """Pairs, and what transformers gives them."""
    kind = LAYOUTS[layout][0]
    if family_of(layout):
        return test_decoders.PAIRS, test_decoders.reference(kind, checkpoint_of(kind))
    return test_conformance.PAIRS, test_conformance.reference(checkpoint_of(kind))[0]


@pytest.mark.parametrize(("layout", "file", "name"), ROWS, ids=lambda part: part or "folder")
def test_it_scores_as_transformers_does(
    layout: str,
    file: str,
    name: str,
    layout_of: Folders,
    checkpoint_of: Folders,
    tmp_path: Path,
) -> None:
    source = str(layout_of(layout) / file)
    target, manifest = convert(source, None, tmp_path / "out", family=family_of(layout))
    pairs, theirs = expected(layout, checkpoint_of)
    assert list(manifest.variants) == [name]
    assert not manifest.probes.verified
    with Reranker(target, execution="fp32" if name.startswith("openvino") else None) as reranker:
        ours = reranker.score(pairs, raw=True)
        ranked = reranker.rank(pairs[0][0], [d for q, d in pairs if q == pairs[0][0]])
    tolerance = TOLERANCES[manifest.variants[name].precision]
    assert tolerance.shortfall(Fidelity.of(ours, theirs)) is None
    # With the prefix read once, and in whatever company: the same numbers.
    spread = max(1.0, float(np.ptp(theirs)))
    alone = [ours[i] for i, (q, _) in enumerate(pairs) if q == pairs[0][0]]
    together = [item.logit for item in sorted(ranked, key=lambda item: item.index)]
    np.testing.assert_allclose(together, alone, atol=tolerance.share / 5 * spread)
