"""Qwen3.5: attention in every fourth layer, gated delta nets in the others; on llama.cpp."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_decoders
import tiny_rewritten
from test_conformance import ALONE, PAIRS, conforms
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

from qrank import Reranker
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.ids import checkpoint_ids
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.checkpoint.reference import run_reference
from qrank.converters.convert import convert
from qrank.errors import ConversionError, TargetError

FAMILY = "qwen3-reranker"
SHORT = [pair for pair in PAIRS if len(pair[1]) < 300]


@pytest.fixture(scope="module")
def checkpoint(made_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        tiny_rewritten.qwen3_5(folder / "tiny")

    return made_once("qwen3-5", make) / "tiny"


def test_conformance(checkpoint: Path, tmp_path: Path) -> None:
    """Value heads are six, key heads two: llama.cpp stores them in another order."""
    made = convert(str(checkpoint), [("gguf", "f16")], tmp_path / "b", family=FAMILY)
    read = read_checkpoint(str(checkpoint), family=FAMILY)
    theirs = tiny_rewritten.own_logits(read, Qwen3_5ForCausalLM, SHORT)
    conforms(made.folder, "gguf-f16", SHORT, theirs, ALONE)


def test_the_part_that_reads_images_is_left_out(tmp_path: Path) -> None:
    config = Qwen3_5Config(
        text_config=tiny_rewritten.QWEN3_5,
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64}
        | {"intermediate_size": 16},
        tie_word_embeddings=True,
    )
    folder = tiny_decoders.save(tmp_path / "vl", Qwen3_5ForConditionalGeneration, config)
    read = read_checkpoint(str(folder), family=FAMILY)
    assert read.read_as == "the text part of Qwen3.5 read as Qwen3_5ForCausalLM"
    theirs = tiny_rewritten.own_logits(read, Qwen3_5ForConditionalGeneration, SHORT)
    ids = [checkpoint_ids(read, *pair, tiny_decoders.MAX_LENGTH) for pair in SHORT]
    work = Sequences([np.array(sequence, np.int32) for sequence in ids])
    ours = run_reference(read.load(), work, read.family)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(np.ptp(theirs))))


PRISM = (
    "{%- set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | "
    "first -%}\n{%- set document = messages | selectattr('role', 'eq', 'document') | "
    "map(attribute='content') | first -%}\n<|im_start|>system\nJudge the Document. <|im_end|>\n"
    '<|im_start|>user\nReply "yes" or "no".\n<Query>: {{ query }}\n'
    "<Document>: {{ document }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""A chat template in the form of Prism-Qwen3.5-Reranker's, with fewer words."""


def test_prism_describes_itself(checkpoint: Path, tmp_path: Path) -> None:
    """Its config.json counts a layer that predicts more tokens, and no file has its weights."""
    folder = tiny_decoders.describe(Path(shutil.copytree(checkpoint, tmp_path / "prism")))
    (folder / "chat_template.jinja").write_text(PRISM, "utf-8")
    tiny.edit_config(folder, mtp_num_hidden_layers=1)
    made = convert(str(folder), [("gguf", "f16")], tmp_path / "b")
    assert made.manifest.family.name == "logit-score"
    read = read_checkpoint(str(folder))
    theirs = tiny_rewritten.own_logits(read, Qwen3_5ForCausalLM, SHORT)
    conforms(made.folder, "gguf-f16", SHORT, theirs, ALONE)


def test_other_formats_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="cannot be run as onnx"):
        convert(str(checkpoint), [("onnx", "fp32")], tmp_path / "b", family=FAMILY)
    with pytest.raises(TargetError, match=r"gated delta nets.*--to gguf"):
        Reranker(checkpoint, backend="torch", family=FAMILY)


def test_layers_in_another_pattern_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    config = Qwen3_5TextConfig(
        **tiny_rewritten.QWEN3_5,
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
    )
    tiny_decoders.save(folder, Qwen3_5ForCausalLM, config)
    with pytest.raises(ConversionError, match="every n-th layer is full_attention"):
        convert(str(folder), [("gguf", "f16")], tmp_path / "b", family=FAMILY)
