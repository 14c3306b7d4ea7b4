"""The JSON files beside an exported graph: config.json, tokenizer_config.json and the tokens."""

from __future__ import annotations

from typing import Any

from qrank.bundle.description import Description
from qrank.bundle.family import Family
from qrank.converters.exported_tokenizer import pad_id
from qrank.system.version import __version__

MARK = "qrank_version"
"""A key of config.json by which an exported folder is known again."""

_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}
"""The family's activation -> the class that sentence-transformers applies to a logit."""

_LEFT_OUT = (
    "_name_or_path",
    "auto_map",
    "dtype",
    "num_labels",
    "problem_type",
    "sbert_ce_default_activation_function",
    "torch_dtype",
)
"""Keys of the checkpoint that do not hold for a graph with one label. Code is never exported."""


def config_json(family: Family, description: Description) -> dict[str, Any]:
    """config.json: the checkpoint's, with one label, and sentence-transformers' activation."""
    kept = {key: value for key, value in description.config.items() if key not in _LEFT_OUT}
    return kept | {
        "architectures": [family.architecture],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id(description),
        "sentence_transformers": {"activation_fn": _ACTIVATIONS[family.activation]},
        MARK: __version__,
    }


def tokenizer_config(
    family: Family, description: Description, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """tokenizer_config.json.

    The class is one that takes tokenizer.json as it is, in transformers 4 and 5. A BERT needs its
    own: in transformers.js only that one returns token types.

    Args:
        family: the bundle's.
        description: the bundle's.
        tokenizer: the exported tokenizer.json.
    """
    types = ["token_type_ids"] if family.segments else []
    normalizer = tokenizer["normalizer"] or {}
    own: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if gives_types(family, tokenizer):
        own = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    return {
        **own,
        "model_max_length": family.max_length,
        "model_input_names": ["input_ids", *types, "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        **special_tokens(description),
    }


def gives_types(family: Family, tokenizer: dict[str, Any]) -> bool:
    """Whether it is a BERT's tokenizer, and its token types matter."""
    kinds = [
        (tokenizer[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")
    ]
    bert = kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
    return family.segments is not None and bert


def special_tokens(description: Description) -> dict[str, str]:
    """special_tokens_map.json: `{"cls_token": "[CLS]", ...}`."""
    return {f"{role}_token": token for role, token in description.special.items()}
