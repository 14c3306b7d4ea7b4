"""Tiny random checkpoints with their own tokenizers, as saved by transformers.

Each function fills a folder and returns it. Weights have a spread wide enough for logits to
spread over several units; otherwise an order of documents would be meaningless.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    XLMRobertaForSequenceClassification,
)
from transformers.utils.logging import disable_progress_bar

from qrank.backends import formats
from qrank.backends.openvino import saturates
from qrank.converters.checkpoint.probes import probe_pairs

needs_vnni = pytest.mark.skipif(saturates(), reason="int8-w8a8 is refused: no VNNI here")

MADE = tuple(
    (name, precision)
    for name, format in formats().items()
    for precision in format.made
    if not (precision == "int8-w8a8" and saturates())
)
"""Every (format, precision) that runs on this machine."""

VARIANTS = tuple(row for row in MADE if row[1] != "int4")
"""The variants of tiny encoders' bundles. int4 is for causal models: a tiny BERT's random weights
are at its limit."""

MAX_LENGTH = 160
"""Maximum number of tokens of every tiny model."""

disable_progress_bar()

_WIDTH = 64
_VOCABULARY = 1200
"""With _WIDTH, large enough for int8 to quantize the word embeddings."""

POOLER_GAIN, _MODERN_GAIN = 10.0, 1.5
"""Factors for a random head, so that logits spread over about 5 units."""

SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * _WIDTH,
    "num_labels": 1,
}

AFTER_PAD: dict[str, Any] = {
    # Positions are counted from pad_token_id + 1.
    "max_position_embeddings": MAX_LENGTH + 2,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""What RoBERTa and its relatives have in common."""

BERT_NAMES = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
ROBERTA_NAMES = {
    "bos": "<s>",
    "cls": "<s>",
    "sep": "</s>",
    "eos": "</s>",
    "unk": "<unk>",
    "pad": "<pad>",
    "mask": "<mask>",
}


def bert(folder: Path) -> Path:
    """BERT with two segments: WordPiece, lowercase."""
    return _bert(folder, segments=2)


def bert_one_segment(folder: Path) -> Path:
    """BERT with one token type in its configuration: it takes no `token_type_ids`."""
    return _bert(folder, segments=1)


def xlm_roberta(folder: Path) -> Path:
    """XLM-RoBERTa: Unigram pieces that include `<s>`, `<pad>` and `<mask>`, like the real ones."""
    model = XLMRobertaForSequenceClassification
    return robertas_relative(folder, 2, model, unigram(), "XLMRobertaTokenizer")


def robertas_relative(
    folder: Path, seed: int, kind: type[PreTrainedModel], tokenizer: Tokenizer, its_class: str
) -> Path:
    """A class with RoBERTa's positions, head and special tokens."""
    torch.manual_seed(seed)
    model = kind(kind.config_class(**SIZES, **AFTER_PAD))
    head = model.classifier.out_proj
    return save(folder, model, head, POOLER_GAIN, tokenizer, its_class, ROBERTA_NAMES)


def modernbert_mean(folder: Path) -> Path:
    """ModernBERT that pools by the mean of all tokens."""
    return _modernbert(folder, "mean")


def modernbert_cls(folder: Path) -> Path:
    """ModernBERT that pools by its first token."""
    return _modernbert(folder, "cls")


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "bert": bert,
    "bert-one-segment": bert_one_segment,
    "xlm-roberta": xlm_roberta,
    "modernbert-mean": modernbert_mean,
    "modernbert-cls": modernbert_cls,
}
"""Every kind of tiny checkpoint, by a name that does not reveal its family's card."""


def edit_config(folder: Path, **values: Any) -> None:
    """Set keys of a checkpoint's config.json; None removes one."""
    edit(folder / "config.json", **values)


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text("utf-8")), **values}
    kept = {key: value for key, value in content.items() if key not in values or value is not None}
    path.write_text(json.dumps(kept), "utf-8")


def widen(model: PreTrainedModel, head: torch.nn.Linear, gain: float) -> None:
    """Draw random weights so that logits differ; `gain` multiplies the head's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Wide enough for attention to be selective and for biases to matter, but no wider:
                # a chaotic network would amplify int8's rounding more than any trained one.
                wide = 0.6 if "embedding" in name else 1.0 / parameter.shape[1] ** 0.5
                torch.nn.init.normal_(parameter, std=wide)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        head.weight.mul_(gain)


def _bert(folder: Path, segments: int) -> Path:
    torch.manual_seed(1)
    config = BertConfig(**SIZES, max_position_embeddings=MAX_LENGTH, type_vocab_size=segments)
    model = BertForSequenceClassification(config)
    head = model.classifier
    return save(folder, model, head, POOLER_GAIN, wordpiece(), "BertTokenizer", BERT_NAMES)


def wordpiece(cls: str = "[CLS]", sep: str = "[SEP]", between: str = "[SEP]") -> Tokenizer:
    """A lowercase WordPiece tokenizer.

    Args:
        cls: the token before a text.
        sep: the token after it.
        between: the tokens between the two texts of a pair.
    """
    special = ["[PAD]", "[UNK]", cls, sep, "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    characters, words = _pieces(tokenizer)
    pieces = [*special, *characters, *(f"##{c}" for c in characters), *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {between} $B:1 {sep}:1",
        special_tokens=[(cls, 2), (sep, 3)],
    )
    return tokenizer


def unigram() -> Tokenizer:
    """A Unigram tokenizer with RoBERTa's special tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    characters, words = _pieces(tokenizer)
    pieces = dict.fromkeys(special, 0.0) | dict.fromkeys(characters, -9.0)
    # Words are likelier than characters, all differently, so that one segmentation is the best.
    pieces |= {word: -6.0 - i / 1000 for i, word in enumerate(words) if len(word) > 1}
    pieces["<mask>"] = 0.0
    tokenizer.model = models.Unigram(list(pieces.items()), unk_id=3)
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def _modernbert(folder: Path, pooling: str) -> Path:
    special = ["|||IP_ADDRESS|||", "<|padding|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY - 60,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][0]["special"] = False
    # As in the real one: runs of 24 to 2 spaces, and BERT's special tokens. The token before the
    # runs comes after them there; here it tests whether the runs keep their ids without it.
    runs = [" " * count for count in range(24, 1, -1)]
    plain = ["|||EMAIL_ADDRESS|||", *runs]
    marks = ["<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]"]
    first = len(content["model"]["vocab"])
    for number, text in enumerate([*plain, *marks], first):
        added = _added(text, number, lstrip=text == "[MASK]")
        added["special"] = text in marks
        added["normalized"] = text in plain
        content["added_tokens"].append(added)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    number = tokenizer.token_to_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", number("[CLS]")), ("[SEP]", number("[SEP]"))],
    )
    config = ModernBertConfig(
        **SIZES | {"num_hidden_layers": 3},
        max_position_embeddings=MAX_LENGTH,
        # Layer 0 attends to everything, layers 1 and 2 to eight tokens on either side.
        global_attn_every_n_layers=3,
        local_attention=16,
        classifier_pooling=pooling,
        cls_token_id=number("[CLS]"),
        sep_token_id=number("[SEP]"),
        pad_token_id=number("[PAD]"),
        bos_token_id=number("[CLS]"),
        eos_token_id=number("[SEP]"),
    )
    torch.manual_seed(3)
    model = ModernBertForSequenceClassification(config)
    head, kind = model.classifier, "PreTrainedTokenizerFast"
    return save(folder, model, head, _MODERN_GAIN, tokenizer, kind, BERT_NAMES)


def _pieces(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Characters of the texts, and every second word; the other words need several pieces.

    Used because the trainers of these two kinds of tokenizer return different pieces each time.
    """
    words: set[str] = set()
    for text in texts():
        normalizer = tokenizer.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        words |= {word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)}
    return sorted({c for word in words for c in word}), sorted(words)[::2]


def texts() -> list[str]:
    # Include all characters that special tokens are written with, so that none is unknown.
    letters = [" ".join(map(chr, range(33, 127)))] * 9
    return [text for pair in probe_pairs() for text in pair] + letters


def _added(text: str, number: int, *, lstrip: bool = False) -> dict[str, Any]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": lstrip,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def save(
    folder: Path,
    model: PreTrainedModel,
    head: torch.nn.Linear,
    gain: float,
    tokenizer: Tokenizer,
    tokenizer_class: str,
    names: dict[str, str],
) -> Path:
    widen(model, head, gain)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    content: dict[str, Any] = {f"{role}_token": token for role, token in names.items()}
    content |= {"tokenizer_class": tokenizer_class, "model_max_length": MAX_LENGTH}
    if getattr(model.config, "type_vocab_size", 1) == 1:
        content["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    return folder
