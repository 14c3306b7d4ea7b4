"""Classes of our own, and rewritten ones, compute what the classes that were published compute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch

from qrank.bundle.family import Family
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint import minicpm
from qrank.converters.checkpoint.configuration import read_rewriting
from qrank.converters.checkpoint.reference import run_reference
from qrank.converters.checkpoint.weights import load_model
from qrank.errors import ConversionError, FamilyError

STORED = json.loads(oracles.FILE.read_text("utf-8"))
FAMILY = Family("any", "any", (), None, 128, "cls", "identity")
"""Of a score head with one label."""


@pytest.fixture(autouse=True)
def fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minicpm, "LAYERS", oracles.LAYERS)


@pytest.mark.parametrize("kind", oracles.CONFIGS)
def test_logits_are_those_of_the_published_class(kind: str, tmp_path: Path) -> None:
    folder = oracles.write(kind, tmp_path / kind)
    work = Sequences([np.array(ids, np.int32) for ids in oracles.IDS], None)
    for dtype in ("float32", "auto"):
        ours = run_reference(load_model(folder, dtype=dtype, attention="eager"), work, FAMILY)
        np.testing.assert_allclose(ours, STORED[kind], rtol=2e-5, atol=2e-5)


def test_computed_weights_stay_exact_beside_16_bits(tmp_path: Path) -> None:
    """Scaled embeddings would be rounded in the data type of the file."""
    folder = oracles.write("minicpm", tmp_path / "model", torch_dtype="bfloat16")
    model = load_model(folder, dtype="auto")
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gte", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = "),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": 8, "mixed_b": 2}}, "rope_scaling = "),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": "8"}}, "'factor': '8'"),
        ("gte", {"pack_qkv": False}, "pack_qkv = False"),
        ("gte", {"logn_attention_scale": True}, "logn_attention_scale = True"),
        ("minicpm", {"head_type": "raw"}, "head_type = 'raw'"),
        ("minicpm", {"start_layer": 4}, "the head behind layer 3"),
        ("minicpm", {"scale_emb": None}, "scale_emb = None"),
    ],
)
def test_what_the_class_does_not_compute_is_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = oracles.write(kind, tmp_path / kind, **changes)
    with pytest.raises((FamilyError, ConversionError), match=message):
        read_rewriting(folder)


def test_weights_without_a_place_are_told(tmp_path: Path) -> None:
    """They would be ignored, and might change every score."""
    folder = oracles.write("gte", tmp_path / "gte")
    tiny.edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ConversionError, match=r"has no place for: gte\.layers\.1"):
        load_model(folder, dtype="float32")
