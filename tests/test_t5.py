"""monoT5 and mT5: encoder-decoders that score at the first step of their decoder."""

import json
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
from safetensors.torch import load_file, save_file
from test_conformance import ALONE, conforms
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.bundle.sequences import Logits
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError
from qrank.scoring.pair_tokenizer import PairTokenizer

LONGEST = 160
LABELS = {"monot5": ("true", "false"), "monomt5": ("yes", "no")}
VARIANTS = [("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8")]
VARIANTS += [("openvino", "fp16"), ("openvino", "int8")]


def _save(folder: Path, kind: type[PreTrainedModel], config: T5Config) -> Path:
    torch.manual_seed(21)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # Attention is not scaled by the heads' width: T5's queries are.
            wide = 0.6 if "shared" in name else 1.0 / parameter.shape[1] ** 0.5
            narrow = config.d_kv**-0.5 if name.endswith("Attention.q.weight") else 1.0
            torch.nn.init.normal_(parameter, std=wide * narrow)
    # Otherwise logits hardly differ, because the decoder's first token is always the same.
    for layer in model.decoder.block:
        layer.layer[1].EncDecAttention.o.weight.data.mul_(4)
    model.shared.weight.data.mul_(8 if getattr(config, "scale_decoder_outputs", False) else 1)
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    described = {"tokenizer_class": "T5Tokenizer", "model_max_length": LONGEST, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), "utf-8")
    return folder


def _tokenizer() -> Tokenizer:
    """T5's: its special tokens come first, and only one is put behind a text."""
    pieces = json.loads(tiny.unigram().to_str())["model"]["vocab"]
    words = [word for pair in LABELS.values() for word in pair]
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = dict.fromkeys(special, 0.0) | {f"▁{word}": -6.5 for word in words}
    vocabulary |= {piece: score for piece, score in pieces if score < 0}
    tokenizer = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


SIZES = {
    "vocab_size": 1400,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
}


def _t5(folder: Path) -> Path:
    """T5: ReLU, and the output matrix is the embeddings, scaled."""
    return _save(folder, T5ForConditionalGeneration, T5Config(**SIZES))


def _mt5(folder: Path) -> Path:
    """mT5: a gated feed-forward network, and an output matrix of its own."""
    config = MT5Config(**SIZES, feed_forward_proj="gated-gelu")
    _save(folder, MT5ForConditionalGeneration, config)
    weights = load_file(folder / "model.safetensors")
    output = torch.randn(SIZES["vocab_size"], SIZES["d_model"]) * 0.3
    metadata = {"format": "pt"}
    save_file(weights | {"lm_head.weight": output}, folder / "model.safetensors", metadata)
    tiny.edit_config(folder, tie_word_embeddings=False)
    return folder


MAKERS = {"monot5": _t5, "monomt5": _mt5}


@pytest.fixture(scope="module", params=list(MAKERS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, made_once: Callable[..., Path]) -> Path:
    return made_once(family, lambda folder: MAKERS[family](folder / "tiny")) / "tiny"


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
    return ids if len(ids) <= LONGEST else [*ids[: LONGEST - len(behind)], *behind]


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
    folder = _t5(tmp_path / "t5")
    with pytest.raises(FamilyError, match=r"translators are, too: .*--family: monot5$"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("number", [-1, 1400, "x"])
def test_a_first_token_that_is_none_is_refused(number: object, tmp_path: Path) -> None:
    folder = _t5(tmp_path / "t5")
    tiny.edit_config(folder, decoder_start_token_id=number)
    named = pytest.raises(ConversionError, match=rf"decoder_start_token_id.*{number}")
    with named:
        convert(str(folder), [("onnx", "fp32")], tmp_path / "b", family="monot5")


def test_gguf_is_refused(tmp_path: Path) -> None:
    folder = _t5(tmp_path / "t5")
    with pytest.raises(ConversionError, match="models of family monot5 cannot be run as gguf"):
        convert(str(folder), [("gguf", "f16")], tmp_path / "b", family="monot5")
