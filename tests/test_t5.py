"""monoT5 and mT5: encoder-decoders that score at the first step of their decoder."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_conformance import ALONE, conforms
from tiny_t5 import CHECKPOINTS, LABELS, MAX_LENGTH, t5
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.bundle.sequences import Logits
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError
from qrank.scoring.pair_tokenizer import PairTokenizer

VARIANTS = [("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8")]
VARIANTS += [("openvino", "fp16"), ("openvino", "int8")]


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, made_once: Callable[..., Path]) -> Path:
    return made_once(family, lambda folder: CHECKPOINTS[family](folder / "tiny")) / "tiny"


@pytest.fixture(scope="module")
def bundle(family: str, checkpoint: Path, made_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        assert not convert(str(checkpoint), VARIANTS, folder / "b", family=family).failed

    return made_once(f"{family}-bundle", make) / "b"


def pairs() -> list[tuple[str, str]]:
    chance = random.Random(3)
    words = [word for pair in probe_pairs() for text in pair for word in text.split()]
    sizes = [0, 1, 1, 2, 3, 5, 8, 12, 20, 30, 50, 90, 150]
    found = [(chance.choice(words), " ".join(chance.choices(words, k=k))) for k in sizes * 2]
    return [*found, ("", ""), ("two words ", "\n\n lines first "), ("a", "b  ")]


PAIRS = pairs()


def prompt_ids(tokenizer: object, query: str, document: str) -> list[int]:
    """The whole prompt, as pygaggle and mteb ask; a document that is too long loses its end."""
    call: Callable[..., dict[str, list[int]]] = tokenizer  # type: ignore[assignment]
    ids = call(f"Query: {query} Document: {document} Relevant:")["input_ids"]
    behind = call(" Relevant:")["input_ids"]
    return ids if len(ids) <= MAX_LENGTH else [*ids[: MAX_LENGTH - len(behind)], *behind]


@cache
def reference(folder: Path, labels: tuple[str, str]) -> Logits:
    """The difference of two of the vocabulary's logits, from the class itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    true, false = (tokenizer.convert_tokens_to_ids(f"▁{label}") for label in labels)
    logits = []
    for query, document in PAIRS:
        ids = torch.tensor([prompt_ids(tokenizer, query, document)])
        with torch.inference_mode():
            step = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        logits.append((step[true] - step[false]).item())
    return np.array(logits, np.float32)


@pytest.mark.parametrize("row", VARIANTS, ids="-".join)
def test_conformance(family: str, checkpoint: Path, bundle: Path, row: tuple[str, str]) -> None:
    """In fp16 too: buckets of distances would be wrong if they were computed in fp16."""
    conforms(bundle, "-".join(row), PAIRS, reference(checkpoint, LABELS[family]), ALONE)


def test_the_original_conforms(family: str, checkpoint: Path) -> None:
    theirs = reference(checkpoint, LABELS[family])
    conforms(checkpoint, "torch-fp32", PAIRS, theirs, ALONE, family=family)


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n:?.'"), max_size=30)


@cache
def tokenizers_of(folder: Path, checkpoint: Path) -> tuple[PairTokenizer, object]:
    ours = PairTokenizer(folder / TOKENIZER, Manifest.load(folder).family)
    return ours, AutoTokenizer.from_pretrained(checkpoint)


@given(query=TEXT, document=TEXT | TEXT.map(lambda text: text * 40))
def test_a_prompt_in_pieces_is_the_whole_prompt(
    checkpoint: Path, bundle: Path, query: str, document: str
) -> None:
    ours, theirs = tokenizers_of(bundle, checkpoint)
    ids, _ = ours.whole(query, document)
    assert ids.tolist() == prompt_ids(theirs, query, document)


def test_a_translator_is_refused_with_the_families_it_could_be(tmp_path: Path) -> None:
    folder = t5(tmp_path / "t5")
    with pytest.raises(FamilyError, match=r"translators are, too: .*--family: monot5$"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("number", [-1, 1400, "x"])
def test_a_first_token_that_is_none_is_refused(number: object, tmp_path: Path) -> None:
    folder = t5(tmp_path / "t5")
    tiny.edit_config(folder, decoder_start_token_id=number)
    named = pytest.raises(ConversionError, match=rf"decoder_start_token_id.*{number}")
    with named:
        convert(str(folder), [("onnx", "fp32")], tmp_path / "b", family="monot5")


def test_gguf_is_refused(tmp_path: Path) -> None:
    folder = t5(tmp_path / "t5")
    with pytest.raises(ConversionError, match="models of family monot5 cannot be run as gguf"):
        convert(str(folder), [("gguf", "f16")], tmp_path / "b", family="monot5")
