"""The pairs that every conversion is proven with, and the pairs for calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qrank.errors import InputError
from qrank.system.safejson import parse_object
from qrank.system.textfiles import TextFile

_LONGEST = 900
"""Characters of a long probe, times 1 to 4: within the models' limits, 3 to 512 tokens."""


_WORDS = 4
"""Number of words added to a vocabulary that probes contain."""


def probe_pairs(words: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Pairs of varied length, language and relevance: 44, from an empty document to a long one.

    Args:
        words: words added to the model's vocabulary; up to 4 of them get two more pairs each.
    """
    topics = _topics()
    documents = [text for topic in topics for text in (topic["answer"], topic["related"])]
    pairs = []
    for i, topic in enumerate(topics):
        query = topic["query"]
        unrelated = topics[(i + 3) % len(topics)]["answer"]
        rotated = " ".join(documents[2 * i :] + documents[: 2 * i])
        long = rotated[: _LONGEST * (i % 4 + 1)]
        pairs += [(query, text) for text in (topic["answer"], topic["related"], unrelated, long)]
    query = topics[0]["query"]
    pairs += [(query, ""), (query, "Mars"), (query, "🪐 mars!!"), ("?", topics[2]["answer"])]
    for i, word in enumerate(words[:: max(len(words) // _WORDS, 1)][:_WORDS]):
        topic = topics[i % len(topics)]
        # Alone, at both ends, inside a word and in capitals: the token's flags decide what matches.
        text = f"{word} {topic['related']} ({word}) x{word}y {word.upper()} {word.title()} {word}"
        pairs += [(topic["query"], text), (f"{topic['query']} {word}", topic["answer"])]
    return pairs


def calibration_pairs() -> list[tuple[str, str]]:
    """Other pairings of the same topics: calibration must not use the probes.

    They include empty and long texts: quantized activations are wrong outside the calibrated range.
    """
    topics = _topics()
    documents = [text for topic in topics for text in (topic["related"], topic["answer"])]
    pairs = [
        (topic["query"], topics[(i + shift) % len(topics)][kind])
        for i, topic in enumerate(topics)
        for shift, kind in ((1, "related"), (2, "answer"), (4, "related"))
    ]
    pairs += [(topic["query"], "") for topic in topics[1:4]]
    pairs += [("?", topics[4]["related"]), ("why", ""), ("", topics[3]["answer"]), ("", "")]
    for count in range(1, 5):
        rotated = " ".join(documents[2 * count + 1 :] + documents[: 2 * count + 1])
        pairs.append((topics[2 * count - 1]["query"], rotated[: _LONGEST * count]))
    return pairs


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The user's own pairs: JSON lines with "query" and "document".

    Raises:
        InputError: a line is something else, or there are no lines.
    """
    pairs = []
    with TextFile(path) as file:
        for number, line in file:
            where = f"{file.name}, line {number}"
            expected = 'a JSON object with "query" and "document" strings'
            record = parse_object(line, where, expected)
            query, document = record.get("query"), record.get("document")
            if not isinstance(query, str) or not isinstance(document, str):
                raise InputError(f"{where}: expected {expected}, found {line.strip()[:60]!r}")
            pairs.append((query, document))
    if not pairs:
        raise InputError(f"{path} holds no pairs")
    return pairs


def _topics() -> list[dict[str, str]]:
    text = resources.files(__package__).joinpath("probes.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]
