"""How the cross-encoder reads a pair: its vocabulary, and the layout of the two texts."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from embed import backbone
from sources import cache_folder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

VOCABULARY = 22_000
"""Tokens kept of the backbone's 30,522: what fits into 46 MB of fp16 with two more layers."""
FOREIGN = re.compile(r"\[unused\d+\]|.*[^\x00-\u024f\u2000-\u21ff]")
"""Tokens that no text uses, or that contain a non-Latin character: mini reads English."""


@cache
def kept_tokens() -> list[int]:
    """The backbone's ids of the kept tokens, ascending: a token's new id is its index in this list.

    These are the tokens that the passages use most, with ties in the order of the backbone's ids.
    Special tokens, single characters and their `##` forms are always kept.
    """
    made = _file()
    ours = {t: at for t, at in made["model"]["vocab"].items() if not FOREIGN.fullmatch(t)}
    always = {at for token, at in ours.items() if len(token.removeprefix("##")) == 1}
    always |= {token["id"] for token in made["added_tokens"]}
    used = _uses()
    rest = sorted(set(ours.values()) - always, key=lambda at: (-used.get(at, 0), at))
    return sorted([*always, *rest[: VOCABULARY - len(always)]])


def _uses() -> dict[int, int]:
    """How often the passages use each of the backbone's tokens; counted once, cached in a file."""
    path = cache_folder() / "tokens.json"
    if not path.exists():
        whole, count = AutoTokenizer.from_pretrained(backbone()), Counter[int]()
        with (cache_folder() / "passages.jsonl").open() as lines:
            for line in lines:
                count.update(whole(json.loads(line)["text"], add_special_tokens=False).input_ids)
        path.write_text(json.dumps(count))
    return {int(at): uses for at, uses in json.loads(path.read_text()).items()}


def _file() -> dict:  # type: ignore[type-arg]
    read: dict = json.loads((backbone() / "tokenizer.json").read_text())  # type: ignore[type-arg]
    return read


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The backbone's tokenizer with only the kept tokens, without truncation or padding."""
    made, ids = _file(), {old: new for new, old in enumerate(kept_tokens())}
    made["truncation"] = made["padding"] = None
    vocabulary = made["model"]["vocab"]
    made["model"]["vocab"] = {t: ids[at] for t, at in vocabulary.items() if at in ids}
    for token in made["added_tokens"]:
        token["id"] = ids[token["id"]]
    for special in made["post_processor"]["special_tokens"].values():
        special["ids"] = [ids[at] for at in special["ids"]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(made))
        settings = (backbone() / "tokenizer_config.json").read_text()
        (Path(folder) / "tokenizer_config.json").write_text(settings)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def pair_ids(query: Sequence[int], document: Sequence[int], limit: int) -> list[int]:
    """`[CLS] query [SEP] document [SEP]`, with the document cut to fit."""
    start, end = tokenizer().cls_token_id, tokenizer().sep_token_id
    return [start, *query, end, *document[: max(0, limit - len(query) - 3)], end]
