"""Tiny random checkpoints of further encoder families: variations of the kinds in `tiny.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tiny import (
    AFTER_PAD,
    BERT_NAMES,
    MAX_LENGTH,
    POOLER_GAIN,
    ROBERTA_NAMES,
    SIZES,
    edit,
    robertas_relative,
    save,
    texts,
    unigram,
    wordpiece,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CamembertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaForSequenceClassification,
)

from qrank.converters.checkpoint.gte_class import GteConfig, GteForSequenceClassification
from qrank.converters.checkpoint.jina_v1_class import (
    JinaBertConfig,
    JinaBertForSequenceClassification,
)


def roberta(folder: Path) -> Path:
    """RoBERTa: byte-level BPE."""
    kind = RobertaForSequenceClassification
    return robertas_relative(folder, 6, kind, _byte_bpe(), "RobertaTokenizer")


def bert_two_labels(folder: Path) -> Path:
    """BERT with two labels, the second of which means relevant."""
    torch.manual_seed(13)
    sizes = SIZES | {"num_labels": 2}
    model = BertForSequenceClassification(
        BertConfig(**sizes, max_position_embeddings=MAX_LENGTH, type_vocab_size=2)
    )
    head, kind = model.classifier, "BertTokenizer"
    return save(folder, model, head, POOLER_GAIN, wordpiece(), kind, BERT_NAMES)


def camembert(folder: Path) -> Path:
    """CamemBERT: Unigram."""
    kind = CamembertForSequenceClassification
    return robertas_relative(folder, 7, kind, unigram(), "PreTrainedTokenizerFast")


def electra(folder: Path) -> Path:
    """ELECTRA, with embeddings narrower than its layers."""
    torch.manual_seed(8)
    config = ElectraConfig(**SIZES, embedding_size=32, max_position_embeddings=MAX_LENGTH)
    model = ElectraForSequenceClassification(config)
    head, kind = model.classifier.out_proj, "ElectraTokenizer"
    return save(folder, model, head, POOLER_GAIN, wordpiece(), kind, BERT_NAMES)


def distilbert(folder: Path) -> Path:
    """DistilBERT: no token types, and names of its own in config.json."""
    torch.manual_seed(9)
    config = DistilBertConfig(
        vocab_size=SIZES["vocab_size"],
        dim=SIZES["hidden_size"],
        hidden_dim=SIZES["intermediate_size"],
        n_layers=SIZES["num_hidden_layers"],
        n_heads=SIZES["num_attention_heads"],
        max_position_embeddings=MAX_LENGTH,
        num_labels=1,
    )
    model = DistilBertForSequenceClassification(config)
    head, kind = model.classifier, "DistilBertTokenizer"
    return save(folder, model, head, POOLER_GAIN, wordpiece(), kind, BERT_NAMES)


def mpnet(folder: Path) -> Path:
    """MPNet: relative positions, and RoBERTa's template with WordPiece."""
    torch.manual_seed(10)
    sizes = AFTER_PAD | {"eos_token_id": 2}
    sizes.pop("type_vocab_size")
    model = MPNetForSequenceClassification(MPNetConfig(**SIZES, **sizes))
    head, kind = model.classifier.out_proj, "PreTrainedTokenizerFast"
    names = ROBERTA_NAMES | {"unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}
    tokenizer = wordpiece("<s>", "</s>", "</s> </s>")
    return save(folder, model, head, POOLER_GAIN, tokenizer, kind, names)


def deberta_v2(folder: Path) -> Path:
    """DeBERTa-v3: distances in buckets, which are logarithmic beyond 16 tokens."""
    torch.manual_seed(11)
    config = DebertaV2Config(
        **SIZES,
        max_position_embeddings=MAX_LENGTH,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=32,
        max_relative_positions=-1,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        pooler_hidden_size=SIZES["hidden_size"],
        pooler_hidden_act="gelu",
        pooler_dropout=0,
        layer_norm_eps=1e-7,
    )
    model = DebertaV2ForSequenceClassification(config)
    return save(
        folder,
        model,
        model.classifier,
        POOLER_GAIN,
        wordpiece(),
        "PreTrainedTokenizerFast",
        BERT_NAMES,
    )


def gte(folder: Path) -> Path:
    """gte-multilingual-reranker: rotary positions, scaled, and a gated feed-forward network."""
    torch.manual_seed(11)
    config = GteConfig(
        **SIZES,
        hidden_act="gelu",
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "linear", "rope_theta": 160_000.0, "factor": 1.07},
        **{key: AFTER_PAD[key] for key in ("type_vocab_size", "pad_token_id")},
    )
    model = GteForSequenceClassification(config)
    head, kind = model.classifier, "XLMRobertaTokenizer"
    return save(folder, model, head, POOLER_GAIN, unigram(), kind, ROBERTA_NAMES)


def jina_v1(folder: Path) -> Path:
    """jina-reranker-v1: ALiBi and a gated feed-forward network. Six heads: no power of two."""
    torch.manual_seed(12)
    sizes = SIZES | {"hidden_size": 96, "num_attention_heads": 6}
    config = JinaBertConfig(**sizes, max_position_embeddings=MAX_LENGTH)
    model = JinaBertForSequenceClassification(config)
    head, kind = model.classifier, "RobertaTokenizer"
    names = ROBERTA_NAMES
    folder = save(folder, model, head, POOLER_GAIN, _byte_bpe(), kind, names)
    edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    return folder


def _byte_bpe() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=SIZES["vocab_size"] - 1,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return tokenizer


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "roberta": roberta,
    "bert-two-labels": bert_two_labels,
    "camembert": camembert,
    "electra": electra,
    "distilbert": distilbert,
    "mpnet": mpnet,
    "deberta-v2": deberta_v2,
    "gte-multilingual": gte,
    "jina-reranker-v1": jina_v1,
}
"""Every kind, by a name that is its family's, except for CamemBERT: RoBERTa's."""

FAMILIES = {"bert-two-labels": "bert-two-labels"}
"""Families that no config.json tells from others."""
