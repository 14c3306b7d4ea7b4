"""Text is read as the checkpoint's own tokenizer files say, whatever transformers makes of them."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny
from odd_texts import WORDS, odd_texts
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.checkpoint.tokenizer import is_control
from qrank.errors import MissingExtraError
from qrank.scoring.text_tokenizer import TextTokenizer

TEXTS = odd_texts(2000)


XLM_ROBERTA = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
DEBERTA = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3) | dict(
    pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]"
)
"""Special pieces in the *.model files of the two."""


def pieces(special: Mapping[str, Any]) -> bytes:
    """A *.model file with the charsmap of most sentencepiece models (nmt_nfkc)."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*tiny.texts(), *WORDS]),
        model_writer=made,
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **special,
    )
    return made.getvalue()


def unigram(names: Mapping[str, str], normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """A Unigram tokenizer with special tokens of these names.

    Args:
        names: the special tokens by their roles.
        normalizer: makes the normalizer of the one that sentencepiece's charsmap is.
        pre_tokenizer: the pre-tokenizer.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces(XLM_ROBERTA))
    start, end = names["cls"], names["sep"]
    special = [start, names["pad"], end, names["unk"]]
    listed = [(text, 0.0) for text in special]
    listed += [(piece.piece, piece.score) for piece in model.pieces[3:]]
    tokenizer = Tokenizer(models.Unigram([*listed, (names["mask"], 0.0)], unk_id=3))
    charsmap = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    tokenizer.normalizer = normalizer(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([*special, AddedToken(names["mask"], lstrip=True)])
    between = f"{end} {end} $B {end}" if start == "<s>" else f"{end} $B:1 {end}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {between}",
        special_tokens=[(start, 0), (end, 2)],
    )
    return tokenizer


_ONE_SPACE = normalizers.Replace(Regex(" {2,}"), " ")
_ONE_MARK = normalizers.Replace(Regex(" {2,}"), "▁")
_STRIP_END = normalizers.Strip(left=False, right=True)


def bert_cased(folder: Path) -> dict[str, Any]:
    tokenizer = written(folder)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"do_lower_case": False}


def bert_with_options(folder: Path) -> dict[str, Any]:
    """BERT's normalizer; tokenizer_config.json has no key for `clean_text`."""
    tokenizer = written(folder)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": True}


def xlm_roberta(folder: Path) -> dict[str, Any]:
    """As on the hub: made by the first converter of transformers."""
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    made = unigram(tiny.ROBERTA_NAMES, lambda mapped: mapped, pre_tokenizers.Sequence(words))
    made.save(str(folder / "tokenizer.json"))
    return {}


def xlm_roberta_4(folder: Path) -> dict[str, Any]:
    """As made by transformers 4."""
    made = unigram(
        tiny.ROBERTA_NAMES,
        lambda mapped: normalizers.Sequence([mapped, _STRIP_END, _ONE_MARK]),
        pre_tokenizers.Metaspace(),
    )
    made.save(str(folder / "tokenizer.json"))
    return {}


def deberta_v3(folder: Path) -> dict[str, Any]:
    """As made by transformers 4; version 5 has other normalizers, without the charsmap."""
    made = unigram(
        tiny.BERT_NAMES,
        lambda mapped: normalizers.Sequence([normalizers.Strip(), mapped, _ONE_SPACE]),
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace()]),
    )
    made.save(str(folder / "tokenizer.json"))
    return {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False}


def roberta_with_prefix_space(folder: Path) -> dict[str, Any]:
    tokenizer = written(folder)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"add_prefix_space": True}


def as_it_is(folder: Path) -> dict[str, Any]:
    return {}


KINDS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "BERT": ("bert", as_it_is),
    "BERT, cased": ("bert", bert_cased),
    "BERT, options": ("bert", bert_with_options),
    "XLM-R": ("xlm-roberta", xlm_roberta),
    "XLM-R, transformers 4": ("xlm-roberta", xlm_roberta_4),
    "DeBERTa-v3": ("deberta-v2", deberta_v3),
    "RoBERTa": ("roberta", as_it_is),
    "RoBERTa, prefix space": ("roberta", roberta_with_prefix_space),
    "ModernBERT": ("modernbert-mean", as_it_is),
    "CamemBERT": ("camembert", as_it_is),
}
"""Name -> the kind of checkpoint, and a function that gives it other tokenizer files and returns
keys for its tokenizer_config.json."""


def written(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def configure(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def check(folder: Path, theirs: Tokenizer) -> None:
    """Compare qrank's ids of the odd texts, alone and in a pair, with a tokenizer's."""
    checkpoint = read_checkpoint(str(folder))
    ours = TextTokenizer(json.dumps(checkpoint.text_tokenizer()))
    differ = {
        text: (ids.tolist(), expected)
        for text, ids in zip(TEXTS, ours.ids(TEXTS), strict=True)
        if ids.tolist() != (expected := theirs.encode(text, add_special_tokens=False).ids)
    }
    assert not differ
    pair = TEXTS[5:7]
    assert checkpoint.tokenizer(*pair)["input_ids"] == theirs.encode(*pair).ids


@pytest.fixture
def copy_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(checkpoint_of(kind), tmp_path / "model"))

    return copy


def test_the_odd_texts_are_odd_and_reach_no_special_token() -> None:
    assert len(set(TEXTS)) == 2000
    assert max(map(len, TEXTS)) > 1 << 15
    special = {*tiny.BERT_NAMES.values(), *tiny.ROBERTA_NAMES.values()}
    assert not any(name in text for name in special for text in TEXTS)
    assert all(is_control(name, special=True) for name in special)


@pytest.mark.parametrize("saved_by_5", [False, True], ids=["as written", "saved by transformers 5"])
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_tokenizer_json(
    name: str, saved_by_5: bool, copy_of: Callable[[str], Path]
) -> None:
    kind, change = KINDS[name]
    folder = copy_of(kind)
    configure(folder, **change(folder))
    if saved_by_5:
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    check(folder, written(folder))


def test_other_rules_are_noticed_though_no_sample_shows_them(
    copy_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of("xlm-roberta")
    tokenizer = written(folder)
    tokenizer.normalizer = normalizers.Replace("quaoar", "planet")
    tokenizer.save(str(folder / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "qrank"):
        read = read_checkpoint(str(folder)).tokenizer
    assert not caplog.records
    assert read("quaoar")["input_ids"] == read("planet")["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_add_prefix_space_is_the_tokenizer_configs(
    prefix: bool, copy_of: Callable[[str], Path]
) -> None:
    """Every version of transformers follows the config, whatever tokenizer.json says."""
    folder = copy_of("roberta")
    tokenizer = written(folder)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not prefix)
    tokenizer.save(str(folder / "tokenizer.json"))
    configure(folder, add_prefix_space=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    check(folder, tokenizer)


def test_vocab_json_and_merges_txt(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("roberta")
    tokenizer = written(folder)
    tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    assert (folder / "vocab.json").is_file()
    assert (folder / "merges.txt").is_file()
    check(folder, tokenizer)


def only_pieces(folder: Path, name: str, special: Mapping[str, Any], cls: str) -> Any:
    """Replace tokenizer.json by a file of sentencepiece; return its own reader."""
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content := pieces(special))
    configure(folder, tokenizer_class=cls)
    return sentencepiece.SentencePieceProcessor(model_proto=content)


SPELLED = [
    *(
        "ＦＵＬＬ　ｗｉｄｔｈ",
        "ﬁne oﬃce",
        "Ⅻ ½ ㎏ ①",
        "naïve Ångström",
        "日本語の文 火星",
        "don't stop!",
    ),
    *("  two  spaces,\ttabs\r\n\nand lines  ", "a\u00a0b\u3000c", "planet\u200bary", ""),
]


@pytest.mark.parametrize(
    ("kind", "name", "special", "cls", "shift"),
    [
        ("xlm-roberta", "sentencepiece.bpe.model", XLM_ROBERTA, "XLMRobertaTokenizer", 1),
        ("deberta-v2", "spm.model", DEBERTA, "DebertaV2Tokenizer", 0),
        ("camembert", "sentencepiece.bpe.model", XLM_ROBERTA, "CamembertTokenizer", 4),
    ],
    ids=["XLM-R", "DeBERTa-v3", "CamemBERT"],
)
def test_a_file_of_sentencepiece(
    kind: str,
    name: str,
    special: Mapping[str, Any],
    cls: str,
    shift: int,
    copy_of: Callable[[str], Path],
) -> None:
    """Also its charsmap, which two classes of transformers 5 drop."""
    folder = copy_of(kind)
    theirs = only_pieces(folder, name, special, cls)
    ours = TextTokenizer(json.dumps(read_checkpoint(str(folder)).text_tokenizer()))
    for text, ids in zip(SPELLED, ours.ids(SPELLED), strict=True):
        assert ids.tolist() == [number + shift for number in theirs.encode(text)], text


def test_a_file_of_sentencepiece_takes_that_package(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("xlm-roberta")
    only_pieces(folder, "sentencepiece.bpe.model", XLM_ROBERTA, "XLMRobertaTokenizer")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtraError, match=r'sentencepiece .*pip install "qrank\[convert\]"'):
        read_checkpoint(str(folder))
