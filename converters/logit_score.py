"""Checkpoints that say themselves how they score: sentence-transformers' LogitScore metadata.

Beside the weights such a checkpoint has a `modules.json` with a LogitScore module, whose config
names the token ids that are compared, and a chat template with the roles "query" and "document".
Source: cross_encoder/modules/logit_score.py and base/modules/transformer.py of its version 6.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.errors import FamilyError
from qrank.family import Card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = [
    "modules.json",
    "*LogitScore/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "chat_template.jinja",
]
"""What the metadata lies in."""


def logit_score_card(
    folder: Path, config: dict[str, Any], read_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> Card | None:
    """The card that a checkpoint's own metadata comes to; None where it has none.

    The tokenizer is read only where there is some.

    Raises:
        FamilyError: the metadata is there, and names no tokens or has no chat template for a pair.
    """
    modules = _json(folder / "modules.json", [])
    places = [m.get("path", "") for m in modules if str(m.get("type")).endswith(".LogitScore")]
    if not places:
        return None
    ids = _json(folder / places[0] / "config.json", {})
    numbers = [ids.get("true_token_id"), ids.get("false_token_id")]
    tokenizer = read_tokenizer()
    labels = [tokenizer.decode([number]) for number in numbers if number is not None]
    if not labels:
        raise FamilyError(f"{folder}: {places[0]}/config.json names no true_token_id")
    settings = _json(folder / "config_sentence_transformers.json", {})
    prompt = settings.get("prompts", {}).get(settings.get("default_prompt_name"), "")
    transformer = _json(folder / "sentence_bert_config.json", {})
    options = transformer.get("processing_kwargs", {}).get("chat_template", {})
    card = Card(
        name="logit-score",
        about="a checkpoint with sentence-transformers' LogitScore metadata",
        architectures=tuple(config["architectures"]),
        template=_items(_rendered(tokenizer, prompt, options, folder), tokenizer),
        pooling="last",
        activation="sigmoid",
        labels=tuple(labels),
        max_length=transformer.get("max_seq_length"),
    )
    card.check(f"{folder}: its chat template")
    return card


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: dict[str, Any], folder: Path
) -> str:
    """The chat template with slots for query and document."""
    if tokenizer.chat_template is None:
        raise FamilyError(f"{folder} scores by LogitScore, and has no chat template to ask with")
    system = [{"role": "system", "content": prompt}] if prompt else []
    pair = [{"role": role, "content": f"{{{role}}}"} for role in ("query", "document")]
    text = tokenizer.apply_chat_template([*system, *pair], tokenize=False, **options)
    if not isinstance(text, str) or "{query}" not in text or "{document}" not in text:
        raise FamilyError(
            f'{folder}: its chat template shows no messages of the roles "query" and "document"; '
            "say which family it is with --family"
        )
    return text


def _items(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Cut a rendered template at special tokens, and where the document begins.

    There only in front of a space or a line's end behind other text, where tokenizers cut as well;
    the conversion compares the outcome with the whole.
    """
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
    special = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
    items = [item for item in re.split(f"({special})", text) if item]
    return tuple(
        part
        for item in items
        for part in re.split(r"(?<=[^\s])(?=\s\{document\})|(?<=\{document\})", item)
        if part
    )


def _json(path: Path, otherwise: Any) -> Any:
    if not path.is_file():
        return otherwise
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FamilyError(f"{path} is not valid JSON: {error}") from error
