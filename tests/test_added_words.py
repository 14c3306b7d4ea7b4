"""Words added to a vocabulary are one token, as in the original; special tokens are text."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_decoders
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from qrank import Reranker
from qrank.bundle.sequences import Logits
from qrank.converters.checkpoint.ids import checkpoint_ids
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.checkpoint.tokenizer import is_control, strip_special_tokens
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError
from qrank.scoring.pair_tokenizer import PairTokenizer

KINDS = ("bert", "xlm-roberta", "modernbert-mean", "qwen3")
"""WordPiece, Unigram, and BPE of two vocabularies."""

WORDS = [
    AddedToken("planetoid"),
    AddedToken("Ångström"),
    AddedToken("GmbH", normalized=False),
    AddedToken("alone", single_word=True),
    AddedToken("left", lstrip=True),
    AddedToken("right", rstrip=True),
    AddedToken("<e1>"),
    AddedToken("two words"),
]


def add(folder: Path, tokens: Sequence[AddedToken], target: Path) -> Path:
    """Copy a checkpoint and add tokens; its embeddings already have rows for them."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module", params=KINDS)
def worded(
    request: pytest.FixtureRequest,
    checkpoint_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint of each kind of tokenizer, with added words of every flag."""
    target = tmp_path_factory.mktemp("worded") / "tiny"
    return add(checkpoint_of(request.param), WORDS, target)


def family(folder: Path) -> str | None:
    return "qwen3-reranker" if "ForCausalLM" in (folder / "config.json").read_text() else None


@cache
def tokenizers(folder: Path) -> tuple[Any, PairTokenizer]:
    checkpoint = read_checkpoint(str(folder), family=family(folder))
    made = json.dumps(checkpoint.text_tokenizer())
    return checkpoint, PairTokenizer(made, checkpoint.family)


PARTS = [*(t.content for t in WORDS), "PLANETOID", "gmbh", "ångström", "s", "mars", "x", ".", "-"]


@given(text=st.lists(st.sampled_from([*PARTS, *" \n"])).map("".join), query=st.sampled_from(PARTS))
def test_a_word_is_the_token_that_it_is_in_the_original(
    worded: Path, query: str, text: str
) -> None:
    checkpoint, ours = tokenizers(worded)
    theirs = checkpoint_ids(checkpoint, query, text, checkpoint.family.max_length)
    assert ours.whole(query, text)[0].tolist() == theirs


def test_words_are_told_from_markers(worded: Path) -> None:
    checkpoint, ours = tokenizers(worded)
    assert set(checkpoint.words) >= {token.content for token in WORDS}
    for word in ("planetoid", "<e1>"):
        number = checkpoint.tokenizer.convert_tokens_to_ids(word)
        assert number in ours.ids([f"a {word} is"])[0]


DOCUMENTS = ["a planetoid beyond mars", "a planet beyond mars", "GmbH alone, <e1> mars", ""]


def reference(folder: Path) -> Logits:
    """Logits computed by transformers only."""
    checkpoint, _ = tokenizers(folder)
    causal = family(folder) is not None
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for document in DOCUMENTS:
        if causal:
            ids = checkpoint_ids(checkpoint, "GmbH", document, tiny_decoders.MAX_LENGTH)
            with torch.inference_mode():
                last = model(input_ids=torch.tensor([ids])).logits[0, -1]
            yes, no = checkpoint.family.labels
            found.append((last[yes] - last[no]).item())
        else:
            inputs = checkpoint.tokenizer([("GmbH", document)], return_tensors="pt")
            with torch.inference_mode():
                found.append(model(**inputs).logits.item())
    return np.array(found, np.float32)


def test_it_scores_as_the_original(worded: Path) -> None:
    with Reranker(worded, backend="torch", family=family(worded)) as reranker:
        ours = reranker.score([("GmbH", document) for document in DOCUMENTS], raw=True)
    np.testing.assert_allclose(ours, reference(worded), atol=1e-4)


def test_a_bundle_scores_as_the_original_and_llama_cpp_knows_the_words(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    words = [AddedToken("planetoid"), AddedToken("GmbH"), AddedToken("<e1>")]
    folder = add(checkpoint_of("qwen3"), words, tmp_path / "model")
    made = convert(str(folder), [("gguf", "f16")], tmp_path / "bundle", family=family(folder))
    bundle, manifest = made.folder, made.manifest
    number = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("planetoid")
    assert any(number in sequence for sequence in manifest.probes.work.ids)
    with Reranker(bundle) as reranker:
        ours = reranker.score([("GmbH", document) for document in DOCUMENTS], raw=True)
    np.testing.assert_allclose(ours, reference(folder), atol=2e-2)

    reader = gguf.GGUFReader(bundle / "gguf-f16" / "model.gguf")
    pieces, kinds = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert pieces is not None
    assert kinds is not None
    types = dict(zip(pieces.contents(), kinds.contents(), strict=True))
    assert types["planetoid"] == types["<e1>"] == gguf.TokenType.USER_DEFINED
    assert types["<think>"] == types["<|im_start|>"] == gguf.TokenType.CONTROL


@pytest.mark.parametrize(
    ("text", "special", "templates", "control"),
    [
        ("[SEP]", True, [], True),
        ("<|fim_prefix|>", False, [], True),
        ("<think>", False, [], True),
        ("</tool_response>", False, [], True),
        ("[Q]", False, ["[CLS][Q]{query}"], True),
        ("[Q]", False, ["[CLS]{query}"], False),
        ("query", False, ["query: {query}"], False),
        ("<table>", False, [], False),
        ("|||IP_ADDRESS|||", False, [], False),
        ("planetoid", False, [], False),
        ("planetoid", True, [], True),
        ("  ", True, [], False),
    ],
)
def test_what_is_control(text: str, special: bool, templates: list[str], control: bool) -> None:
    assert is_control(text, special, templates) is control


def token(text: str, number: int, *, special: bool = False, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": number, "content": text, "special": special, **plain, **flags}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["words last", "words first", "by turns"])
def test_ids_stay_without_the_markers_beside_them(
    kind: str, order: str, checkpoint_of: Callable[[str], Path]
) -> None:
    path = checkpoint_of(kind) / "tokenizer.json"
    original = json.loads(path.read_text("utf-8"))
    first = Tokenizer.from_file(str(path)).get_vocab_size()
    words, marks = ["planetoid", "quaoar"], ["[A]", "[B]"]
    added = {
        "words last": [*marks, *words],
        "words first": [*words, *marks],
        "by turns": [words[0], marks[0], words[1], marks[1]],
    }[order]
    original["added_tokens"] += [
        token(text, number, special=text in marks) for number, text in enumerate(added, first)
    ]
    if (kind, order) == ("xlm-roberta", "by turns"):
        with pytest.raises(ConversionError, match=r"'planetoid'.* by turns"):
            strip_special_tokens(original)
        return
    theirs = Tokenizer.from_str(json.dumps(original))
    ours = Tokenizer.from_str(json.dumps(strip_special_tokens(original)))
    for word in words:
        assert ours.token_to_id(word) == theirs.token_to_id(word) >= first
    for text in ("planetoid and quaoars", "a planetoidal quaoar", "plane quao", ""):
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids
    for text in ("[A]", "planetoid[B]"):
        assert not {theirs.token_to_id(mark) for mark in marks} & set(ours.encode(text).ids)


def test_a_word_that_only_stands_alone_may_be_refused_and_never_misread(
    checkpoint_of: Callable[[str], Path],
) -> None:
    path = checkpoint_of("bert") / "tokenizer.json"
    original = json.loads(path.read_text("utf-8"))
    first = Tokenizer.from_file(str(path)).get_vocab_size()
    original["added_tokens"] += [
        token("planetoid", first, single_word=True),
        token("[A]", first + 1, special=True),
        token("quaoar", first + 2),
    ]
    with pytest.raises(ConversionError, match="WordPiece"):
        strip_special_tokens(original)


def test_a_word_without_an_embedding_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The author added it without `resize_token_embeddings`: the original fails on it too."""
    words = [AddedToken(f"word{number}") for number in range(tiny._VOCABULARY)]
    folder = add(checkpoint_of("bert"), words, tmp_path / "model")
    with pytest.raises(FamilyError, match=r"has the id \d+, and the model has 1200 embeddings"):
        Reranker(folder, backend="torch")
