"""Further encoder families: one precision per format, since the formats treat classes alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_encoders
from test_conformance import ALONE, PAIRS, conforms, exactly, reference

from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert

Folders = Callable[[str], Path]
FAMILIES = {"camembert": "roberta"}
VARIANTS = [("onnx", "int8"), ("openvino", "int8"), ("gguf", "q8_0"), ("mlx", "int8")]
MORE = {
    "deberta-v2": [("onnx", "fp16"), ("openvino", "fp16")],
    "mpnet": [("onnx", "fp16"), ("openvino", "fp16")],
}
"""Buckets of distances would be wrong if they were computed in fp16."""


@pytest.fixture(params=tiny_encoders.CHECKPOINTS)
def encoder(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_the_original_conforms(encoder: str, checkpoint_of: Folders) -> None:
    folder = checkpoint_of(encoder)
    family = tiny_encoders.FAMILIES.get(encoder)
    found = read_checkpoint(str(folder), family=family)
    assert found.family.name == FAMILIES.get(encoder, encoder)
    conforms(folder, "torch-fp32", PAIRS, reference(folder)[0], ALONE, family=family)


def test_conformance(encoder: str, checkpoint_of: Folders, tmp_path: Path) -> None:
    folder = checkpoint_of(encoder)
    family = tiny_encoders.FAMILIES.get(encoder)
    card = read_checkpoint(str(folder), family=family).card
    rows = [*VARIANTS, *MORE.get(encoder, [])]
    variants = [row for row in rows if row[0] not in card.unsupported]
    made = convert(str(folder), variants, tmp_path / "bundle", family=family)
    assert not made.failed
    for row in variants:
        conforms(made.folder, "-".join(row), PAIRS, reference(folder)[0], ALONE, **exactly(row))
