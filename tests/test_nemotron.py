"""llama-nemotron-rerank: Llama with bidirectional attention and a prompt tokenized as a whole."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_decoders
import tiny_rewritten
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_conformance import ALONE, conforms
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from qrank import Reranker
from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.bundle.sequences import Logits
from qrank.converters.checkpoint.ids import checkpoint_ids
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, InputError
from qrank.scoring.pair_tokenizer import PairTokenizer


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rewritten.nemotron(tmp_path_factory.mktemp("nemotron") / "tiny")


@pytest.fixture(scope="module")
def bundle(nemotron: Path) -> Path:
    return convert(str(nemotron), tiny.VARIANTS, nemotron.parent / "bundle").folder


def prompt(query: str, document: str) -> str:
    """The prompt in its model card."""
    return f"question:{query} \n \n passage:{document}"


def pairs() -> list[tuple[str, str]]:
    chance = random.Random(3)
    words = [word for pair in probe_pairs() for text in pair for word in text.split()]
    sizes = [0, 1, 1, 2, 3, 5, 8, 12, 20, 30, 50, 90, 150, 800, 1400]
    found = [(chance.choice(words), " ".join(chance.choices(words, k=k))) for k in sizes * 2]
    return [*found, ("", ""), ("two words", "\n\n lines first")]


PAIRS = pairs()


@cache
def reference(folder: Path) -> Logits:
    """Logits from transformers' Llama, one pair at a time: no mask, and a mean over all tokens."""
    config = json.loads((folder / "config.json").read_text())
    known = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    model = LlamaForSequenceClassification.from_pretrained(
        folder, config=known, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = []
    for query, document in PAIRS:
        ids = torch.tensor([tokenizer(prompt(query, document))["input_ids"]])
        ids = ids[:, : tiny_decoders.MAX_LENGTH]
        everything = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        with torch.inference_mode():
            hidden = model.model(input_ids=ids, attention_mask=everything).last_hidden_state
            logits.append(model.score(hidden[0].mean(0)).item() / tiny_rewritten.TEMPERATURE)
    return np.array(logits, np.float32)


@pytest.mark.parametrize("row", tiny.VARIANTS, ids="-".join)
def test_conformance(nemotron: Path, bundle: Path, row: tuple[str, str]) -> None:
    conforms(bundle, "-".join(row), PAIRS, reference(nemotron), ALONE)


def test_the_original_conforms(nemotron: Path) -> None:
    conforms(nemotron, "torch-fp32", PAIRS, reference(nemotron), ALONE)


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n:?.'"), max_size=30)


@cache
def encoder_of(folder: Path) -> PairTokenizer:
    return PairTokenizer(folder / TOKENIZER, Manifest.load(folder).family)


@given(query=TEXT, document=TEXT)
def test_a_prompt_in_pieces_is_the_whole_prompt(
    nemotron: Path, bundle: Path, query: str, document: str
) -> None:
    checkpoint = read_checkpoint(str(nemotron))
    ids, _ = encoder_of(bundle).whole(query, document)
    assert ids.tolist() == checkpoint_ids(checkpoint, query, document, tiny_decoders.MAX_LENGTH)


def test_it_takes_no_instruction(bundle: Path) -> None:
    refused = pytest.raises(InputError, match="nemotron-rerank take no instruction")
    with Reranker(bundle) as reranker, refused:
        reranker.rank("q", ["d"], instruction="as a lawyer")


def test_another_pooling_is_refused(nemotron: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nemotron, folder)
    tiny.edit_config(folder, pooling="cls")
    with pytest.raises(ConversionError, match="pooling = 'cls'; supported is: 'avg'"):
        convert(str(folder), [("onnx", "fp32")], tmp_path / "bundle")
