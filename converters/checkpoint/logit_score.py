"""Checkpoints that describe their own scoring: sentence-transformers' LogitScore metadata.

Such a checkpoint also has a `modules.json` with a LogitScore module, whose config names the token
ids that are compared, and a chat template with the roles "query" and "document". Source:
cross_encoder/modules/logit_score.py and base/modules/transformer.py of sentence-transformers 6.2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.converters.checkpoint.card import Card
from qrank.converters.checkpoint.json_files import explained, read_json
from qrank.converters.checkpoint.read_tokenizer import control_tokens
from qrank.converters.checkpoint.sentence_transformers import TRANSFORMER, Metadata
from qrank.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LOGIT_SCORE = "logit-score"
"""The name of the family that the metadata describes."""

CONFIG = "*LogitScore/config.json"
"""The file that names the tokens compared."""


def logit_score_card(
    folder: Path,
    source: str,
    config: dict[str, Any],
    metadata: Metadata,
    tokenizer: PreTrainedTokenizerBase,
) -> Card:
    """The card that results from a checkpoint's own metadata.

    Args:
        folder: the checkpoint's folder.
        source: the checkpoint's name in errors.
        config: its config.json.
        metadata: its sentence-transformers metadata; `logit_score` is set.
        tokenizer: the checkpoint's tokenizer.

    Raises:
        FamilyError: the metadata names no tokens, or there is no chat template for a pair.
        ConversionError: a file is not JSON, or the chat template fails.
    """
    card = Card(
        name=LOGIT_SCORE,
        about="a checkpoint with sentence-transformers' LogitScore metadata",
        architectures=tuple(config["architectures"]),
        template=_items(_rendered(tokenizer, metadata, source), tokenizer),
        pooling="last",
        activation="sigmoid",
        labels=_labels(folder, source, metadata, tokenizer),
    )
    card.check(f"{source}: its chat template")
    return card


def _labels(
    folder: Path, source: str, metadata: Metadata, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """The one or two tokens whose logits are the score."""
    name = f"{metadata.logit_score}/config.json"
    path = folder / name
    if not path.is_file():
        raise FamilyError(
            f"{source}: modules.json has path = {metadata.logit_score!r} for LogitScore, and there "
            "is no config.json"
        )
    content = read_json(path, dict, source, name)
    numbers = [content.get(key) for key in ("true_token_id", "false_token_id")]
    if numbers[0] is None:
        raise FamilyError(f"{source}: {name} names no true_token_id")
    if (read := content.get("module_input_name", "causal_logits")) != "causal_logits":
        raise FamilyError(
            f"{source}: {name} has module_input_name = {read!r}; expected 'causal_logits'"
        )
    labels = []
    for key, number in zip(("true_token_id", "false_token_id"), numbers, strict=True):
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokenizer):
            raise FamilyError(
                f"{source}: {name} has {key} = {number!r}; expected an id of the tokenizer, "
                f"0 to {len(tokenizer) - 1}"
            )
        label = tokenizer.decode([number])
        if tokenizer(label, add_special_tokens=False)["input_ids"] != [number]:
            raise FamilyError(
                f"{source}: {name} has {key} = {number}, which is no text of its own ({label!r})"
            )
        labels.append(label)
    return tuple(labels)


def _rendered(tokenizer: PreTrainedTokenizerBase, metadata: Metadata, source: str) -> str:
    """The rendered chat template with slots for query and document."""
    if tokenizer.chat_template is None:
        raise FamilyError(f"{source} scores by LogitScore, and has no chat template to ask with")
    if metadata.chat is None:
        raise FamilyError(
            f"{source}: {TRANSFORMER} has no message in modality_config: sentence-transformers "
            "would ask this causal model without its chat template; say which family it is with "
            "--family"
        )

    def message(role: str, text: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": text}]
        return {"role": role, "content": parts if metadata.structured else text}

    messages = [message("system", metadata.prompt)] if metadata.prompt else []
    messages += [message(role, f"{{{role}}}") for role in ("query", "document")]
    with explained(f"{source}: its chat template fails"):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **metadata.chat)
    if not isinstance(text, str) or "{query}" not in text or "{document}" not in text:
        raise FamilyError(
            f'{source}: its chat template shows no messages of the roles "query" and "document"; '
            "say which family it is with --family"
        )
    return text


def _items(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Split a rendered template at control tokens, before the document and after it.

    Before the document, the split is in front of a space or line break that follows other text:
    tokenizers split there too. `ids.check_ids` compares with the whole prompt: a template whose
    text merges with the end of the document is refused.
    """
    added = sorted(control_tokens(tokenizer), key=len, reverse=True)
    special = "|".join(re.escape(token) for token in added)
    items = [item for item in re.split(f"({special})", text) if item] if special else [text]
    return tuple(
        part
        for item in items
        for part in re.split(r"(?<=[^\s])(?=\s\{document\})|(?<=\{document\})", item)
        if part
    )
