"""Encode pairs as token ids and compare them with those of the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

from qrank.bundle.family import Family, fill
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.json_files import explained
from qrank.converters.checkpoint.logit_score import LOGIT_SCORE
from qrank.converters.checkpoint.read import Checkpoint
from qrank.errors import ConversionError
from qrank.scoring.pair_tokenizer import PairTokenizer

PROBE_TOKENS = 512
"""Length limit of probes: longer ones behave the same, and the reference is slow."""


def encode_pairs(pairs: list[tuple[str, str]], tokenizer: Path | str, family: Family) -> Sequences:
    """Pairs as token ids from qrank's own tokenizer; long ones are truncated."""
    ours = PairTokenizer(tokenizer, family, max_length=min(family.max_length, PROBE_TOKENS))
    sequences, segments = [], []
    for query, document in pairs:
        sequence, types = ours.whole(query, document)
        sequences.append(sequence)
        if types is not None:
            segments.append(types)
    return Sequences(sequences, segments or None)


def check_ids(pairs: list[tuple[str, str]], work: Sequences, checkpoint: Checkpoint) -> None:
    """Compare encoded pairs with transformers' tokenizer.

    Raises:
        ConversionError: the two differ: the card's template does not match the checkpoint.
    """
    family = checkpoint.family
    limit = min(family.max_length, PROBE_TOKENS)
    for (query, document), sequence in zip(pairs, work.ids, strict=True):
        theirs = checkpoint_ids(checkpoint, query, document, limit)
        if sequence.tolist() != theirs:
            raise ConversionError(
                f"family {family.name} reads {query!r}, {document[:40]!r} as other token ids than "
                f"the checkpoint's own tokenizer: {sequence.tolist()} and {theirs}; "
                "give the right card with --family FILE.toml"
            )


def checkpoint_ids(checkpoint: Checkpoint, query: str, document: str, limit: int) -> list[int]:
    """A pair as the checkpoint's own tokenizer reads it, truncated to a limit.

    For a decoder family, the items of the template are tokenized separately, as in the original
    code; sentence-transformers tokenizes the whole prompt of a LogitScore model. Another family
    reads two texts, or one if no token separates query and document. Only the document is cut.
    """
    family, tokenizer = checkpoint.family, checkpoint.tokenizer
    template, text = family.asked(None)
    texts = {"query": query, "document": document, "instruction": text}
    prompt = [fill(item, **texts) for item in template if isinstance(item, str)]
    places = [place for place, item in enumerate(template) if isinstance(item, str)]
    together = not family.decoder and places[1] == places[0] + 1
    if together:
        ids: list[int] = tokenizer("".join(prompt), verbose=False)["input_ids"]
        if len(ids) <= limit:
            return ids
    elif not family.decoder:
        # As a batch of one: otherwise an empty document would count as no document.
        query, document = prompt
        with explained(f"{checkpoint.name}: its tokenizer cannot cut a pair to {limit} tokens"):
            (pair,) = tokenizer([query], [document], truncation="only_second", max_length=limit)[
                "input_ids"
            ]
        return list(pair)
    if family.name == LOGIT_SCORE:
        parts = [
            str(tokenizer.convert_ids_to_tokens(item))
            if isinstance(item, int)
            else fill(item, **texts)
            for item in template
        ]
        ids = tokenizer("".join(parts), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return ids
    items = [
        [item]
        if isinstance(item, int)
        else tokenizer(fill(item, **texts), add_special_tokens=False)["input_ids"]
        for item in template
    ]
    (place,) = (i for i, item in enumerate(template) if "{document}" in str(item))
    room = limit - sum(map(len, items)) + len(items[place])
    items[place] = items[place][:room]
    return [number for item in items for number in item]
