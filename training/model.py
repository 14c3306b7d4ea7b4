"""The cross-encoder's two ends: how it starts, and how a pair is encoded."""

from collections.abc import Sequence

import torch
from embed import backbone
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase


def tokenizer() -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, without the truncation and padding that its file asks for."""
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(backbone(), model_max_length=512)
    made.backend_tokenizer.no_truncation()
    made.backend_tokenizer.no_padding()
    return made


def start(frozen: int) -> BertForSequenceClassification:
    """The bi-encoder's weights under a new one-logit head; embeddings and `frozen` layers fixed.

    No dropout: a model this small and trained this briefly underfits, and dropout's random
    numbers are a third of a step's time on a CPU.
    """
    model = BertForSequenceClassification.from_pretrained(
        backbone(),
        num_labels=1,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.bert.embeddings.requires_grad_(False)
    for layer in model.bert.encoder.layer[:frozen]:
        layer.requires_grad_(False)
    return model


def pair_ids(query: Sequence[int], document: Sequence[int], limit: int) -> list[int]:
    """`[CLS] query [SEP] document [SEP]`, the document cut to fit."""
    return [101, *query, 102, *document[: max(0, limit - len(query) - 3)], 102]
