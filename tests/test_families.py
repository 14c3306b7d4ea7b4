"""Cards, and how a card and a checkpoint's own configuration become a family."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import BertModel

from qrank.bundle.family import Family
from qrank.converters.checkpoint.card import Card, cards
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError, ModelNotFoundError

CARD = """
name = "mine"
about = "a test's own"
architectures = ["BertForSequenceClassification"]
template = ["{cls}", "{query}", "{sep}", "{document}", "{sep}"]
segments = [0, 0, 0, 1, 1]
pooling = "pooler"
activation = "identity"
"""


@pytest.fixture
def copy_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Make a modifiable copy of a kind of checkpoint, with keys of its config.json set."""

    def copy(kind: str, name: str = "model", **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(checkpoint_of(kind), folder)
        tiny.edit_config(folder, **config)
        return folder

    return copy


def refusal(folder: Path, family: str | None = None) -> str:
    """The message that `convert` refuses a checkpoint with."""
    target = folder.parent / "bundle"
    with pytest.raises(FamilyError) as caught:
        convert(str(folder), [("onnx", "fp32")], target, family=family)
    assert not target.exists()
    return str(caught.value)


def test_cards_parse_and_are_the_supported_families() -> None:
    found = {card.name: card.architectures for card in cards()}
    assert found == {
        "bert": ("BertForSequenceClassification",),
        "bert-two-labels": ("BertForSequenceClassification",),
        "bge-reranker-gemma": ("GemmaForCausalLM",),
        "deberta-v2": ("DebertaV2ForSequenceClassification",),
        "distilbert": ("DistilBertForSequenceClassification",),
        "electra": ("ElectraForSequenceClassification",),
        "gte-multilingual": ("GteForSequenceClassification",),
        "jina-reranker-v1": ("JinaBertForSequenceClassification",),
        "monomt5": ("MT5ForConditionalGeneration",),
        "monot5": ("T5ForConditionalGeneration",),
        "modernbert": ("ModernBertForSequenceClassification",),
        "mpnet": ("MPNetForSequenceClassification",),
        "nemotron-rerank": ("LlamaBidirectionalForSequenceClassification",),
        "mxbai-rerank-v2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
        "qwen3-reranker": (
            "Qwen3ForCausalLM",
            "Qwen3ForSequenceClassification",
            "Qwen3_5ForCausalLM",
        ),
        "roberta": (
            "RobertaForSequenceClassification",
            "CamembertForSequenceClassification",
        ),
        "xlm-roberta": ("XLMRobertaForSequenceClassification",),
        "zerank": (
            "Qwen3ForCausalLM",
            "Qwen3ForSequenceClassification",
            "Qwen3_5ForCausalLM",
        ),
    }


def test_a_card_as_a_user_writes_it() -> None:
    card = Card.read(CARD, "mine.toml")
    assert card.name == "mine"
    assert card.template == ("{cls}", "{query}", "{sep}", "{document}", "{sep}")
    assert card.segments == (0, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "mine"', 'name = "mine"\nprompt = "x"', "prompt"),
        ('pooling = "pooler"', "", "pooling"),
        ('"{document}", ', "", "{document}"),
        ('"{query}"', '"{query}", "{query}"', "{query}"),
        ('"{cls}"', '"[CLS]"', "[CLS]"),
        ('["{cls}", ', "[101, ", "template"),
        ("[0, 0, 0, 1, 1]", "[0, 0, 1]", "segments"),
        ('pooling = "pooler"', 'pooling = "pooler"\nclasses = [1, 2]', "classes is [1, 2]"),
        ("[0, 0, 0, 1, 1]", '["0"]', "segments"),
        ('"identity"', '"softmax"', "softmax"),
        ('"identity"', "3", "activation"),
        ('"identity"', '"identity"\npositions_after_pad = 1', "positions_after_pad"),
        ('name = "mine"', "name = mine", "TOML"),
    ],
)
def test_a_bad_card_is_refused_by_what_is_bad(old: str, new: str, named: str) -> None:
    assert old in CARD
    with pytest.raises(FamilyError) as caught:
        Card.read(CARD.replace(old, new), "mine.toml")
    assert "mine.toml" in str(caught.value)
    assert named in str(caught.value)


FAMILY_OF = {
    "bert": "bert",
    "bert-one-segment": "bert",
    "xlm-roberta": "xlm-roberta",
    "modernbert-mean": "modernbert",
    "modernbert-cls": "modernbert",
}


@pytest.mark.parametrize("folder", ["bert", "xlm-roberta", "modernbert", "DebertaV2-base"])
def test_the_config_decides_and_never_the_folders_name(
    kind: str, folder: str, copy_of: Callable[..., Path]
) -> None:
    family = read_checkpoint(str(copy_of(kind, folder))).family
    assert family.name == FAMILY_OF[kind]


def test_template_and_segments_come_from_tokenizer_and_config(
    checkpoint_of: Callable[[str], Path],
) -> None:
    def family(kind: str) -> Family:
        return read_checkpoint(str(checkpoint_of(kind))).family

    assert family("bert").template == (2, "{query}", 3, "{document}", 3)
    assert family("bert").segments == (0, 0, 0, 1, 1)
    assert family("bert-one-segment").segments is None
    assert family("xlm-roberta").template == (0, "{query}", 2, 2, "{document}", 2)
    assert family("xlm-roberta").segments is None
    assert family("modernbert-mean").segments is None


def test_modernbert_pools_as_its_config_says(copy_of: Callable[..., Path]) -> None:
    assert read_checkpoint(str(copy_of("modernbert-mean", "a"))).family.pooling == "mean"
    assert read_checkpoint(str(copy_of("modernbert-cls", "b"))).family.pooling == "cls"
    # The default of transformers.
    unsaid = copy_of("modernbert-mean", "c", classifier_pooling=None)
    assert read_checkpoint(str(unsaid)).family.pooling == "cls"
    other = copy_of("modernbert-cls", "d", classifier_pooling="max")
    with pytest.raises(ConversionError, match="classifier_pooling"):
        read_checkpoint(str(other))


def test_the_limit_is_what_positions_and_tokenizer_leave(copy_of: Callable[..., Path]) -> None:
    """RoBERTa's positions start after the padding id; the tokenizer may set a lower limit."""
    roberta = copy_of("xlm-roberta", "a", max_position_embeddings=102, pad_token_id=1)
    assert read_checkpoint(str(roberta)).family.max_length == 100
    assert read_checkpoint(str(copy_of("bert", "b"))).family.max_length == tiny.MAX_LENGTH
    lower = copy_of("bert", "c")
    path = lower / "tokenizer_config.json"
    content = {**json.loads(path.read_text("utf-8")), "model_max_length": 99}
    path.write_text(json.dumps(content), "utf-8")
    assert read_checkpoint(str(lower)).family.max_length == 99
    # The value by which transformers means no limit.
    path.write_text(json.dumps({**content, "model_max_length": 10**30}), "utf-8")
    assert read_checkpoint(str(lower)).family.max_length == tiny.MAX_LENGTH


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({}, "sigmoid"),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "identity",
        ),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
            "sigmoid",
        ),
        ({"sentence_transformers": {"version": "5.0.0"}}, "sigmoid"),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
            "identity",
        ),
    ],
)
def test_the_activation_is_the_checkpoints_own(
    config: dict[str, Any], activation: str, copy_of: Callable[..., Path]
) -> None:
    assert read_checkpoint(str(copy_of("bert", **config))).family.activation == activation


def test_an_unknown_activation_is_refused(copy_of: Callable[..., Path]) -> None:
    named = "torch.nn.modules.activation.Tanh"
    message = refusal(copy_of("bert", sbert_ce_default_activation_function=named))
    assert named in message


def test_an_unknown_architecture_is_refused_by_name(copy_of: Callable[..., Path]) -> None:
    unknown = "FunnelForSequenceClassification"
    message = refusal(copy_of("bert", architectures=[unknown]))
    assert unknown in message
    for card in cards():
        assert card.architectures[0] in message
    assert "(none)" in refusal(copy_of("bert", "b", architectures=None))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("JinaForRanking", "is listwise"),
        ("Qwen2VLForConditionalGeneration", "reads images"),
        ("CostWiseGemmaForCausalLM", "has a score head in every layer"),
        ("HF_ColBERT", "compares token embeddings"),
    ],
)
def test_a_reranker_that_cannot_run_is_refused_with_another(
    architecture: str, reason: str, copy_of: Callable[..., Path]
) -> None:
    message = refusal(copy_of("bert", architectures=[architecture]))
    assert f"{architecture} {reason}" in message
    assert re.search(r"Use .*\w/\w", message)


def test_an_nli_model_is_refused_as_such(copy_of: Callable[..., Path]) -> None:
    labels = {"0": "contradiction", "1": "entailment", "2": "neutral"}
    assert "(NLI)" in refusal(copy_of("bert", id2label=labels))


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {"0": "NO", "1": "YES"}}, 2),
        ({"id2label": {"0": "A", "1": "B", "2": "C"}}, 3),
        ({"id2label": None, "label2id": None, "num_labels": 2}, 2),
        ({"id2label": None, "label2id": None}, 2),
    ],
)
def test_more_labels_than_one_are_refused(
    config: dict[str, Any], labels: int, copy_of: Callable[..., Path]
) -> None:
    """Also if the config does not mention labels: transformers' default is two."""
    message = refusal(copy_of("bert", **config))
    assert f"{labels} labels" in message
    assert ("--family bert-two-labels" in message) == (labels == 2)


def test_pickles_are_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("tokenizer.json", "{", "transformers cannot read"),
        ("model.safetensors", "{", "safetensors cannot read"),
    ],
)
def test_a_damaged_checkpoint_is_told(
    name: str, content: str, reason: str, copy_of: Callable[..., Path]
) -> None:
    """Whichever error the reader raises: it depends on what is damaged."""
    folder = copy_of("bert")
    (folder / name).write_text(content, "utf-8")
    with pytest.raises(ConversionError, match=reason):
        convert(str(folder), [("onnx", "fp32")], folder.parent / "bundle")
    assert not (folder.parent / "bundle").exists()


def test_a_tokenizer_is_read_without_a_class_that_takes_torch(
    checkpoint_of: Callable[[str], Path],
) -> None:
    """Prebuilt models can be converted without torch."""
    code = (
        "import sys; from qrank.converters.checkpoint.read import read_checkpoint; "
        "read_checkpoint(sys.argv[1]).tokenizer; "
        "print('qrank.converters.checkpoint.nemotron' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint_of("bert"))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="nor a folder or file here, nor a hub id"):
        read_checkpoint(str(tmp_path / "missing"))


def test_a_family_by_name(copy_of: Callable[..., Path]) -> None:
    """For an architecture with another name that fits a card nevertheless."""
    folder = copy_of("bert", architectures=["MyBertForSequenceClassification"])
    assert read_checkpoint(str(folder), family="bert").family.name == "bert"
    message = refusal(folder, family="berta")
    assert "'berta'" in message
    assert ", ".join(card.name for card in cards()) in message


def test_a_family_of_a_users_own(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    card = tmp_path / "mine.toml"
    card.write_text(CARD, "utf-8")
    folder = copy_of("bert")
    family = read_checkpoint(str(folder), family=str(card)).family
    assert (family.name, family.activation) == ("mine", "identity")
    assert "missing.toml" in refusal(folder, family=str(tmp_path / "missing.toml"))


def test_a_checkpoint_without_a_tokenizer_is_refused(
    kind: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers may make up one with special tokens only, for which every word is unknown."""
    folder = Path(shutil.copytree(checkpoint_of(kind), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match="tokenizer"):
        convert(str(folder), [("onnx", "fp32")], tmp_path / "bundle")


def test_a_vocabulary_will_do_for_bert(
    checkpoint_of: Callable[[str], Path], copy_of: Callable[..., Path]
) -> None:
    """Old checkpoints have a vocab.txt but no tokenizer.json."""
    folder = copy_of("bert")
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    words = sorted(vocabulary, key=lambda word: int(vocabulary[word]))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), "utf-8")
    (folder / "tokenizer.json").unlink()
    text = "Which planet is known as the Red Planet?"
    old, new = (
        read_checkpoint(str(path)).tokenizer(text)["input_ids"]
        for path in (checkpoint_of("bert"), folder)
    )
    assert old == new


def test_a_model_without_a_trained_head_is_refused(copy_of: Callable[..., Path]) -> None:
    """transformers would initialize the head at random and only log a warning."""
    folder = copy_of("bert")
    BertModel.from_pretrained(folder).save_pretrained(folder)
    tiny.edit_config(
        folder, architectures=["BertForSequenceClassification"], id2label={"0": "LABEL_0"}
    )
    with pytest.raises(ConversionError, match=r"lacks weights.*classifier\.weight"):
        convert(str(folder), [("onnx", "fp32")], folder.parent / "bundle")
    assert not (folder.parent / "bundle").exists()
