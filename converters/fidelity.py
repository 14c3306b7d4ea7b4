"""Run the fp32 reference, and hold every variant against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrank.backends import Options, opener, processors
from qrank.bundle import Probes, Variant
from qrank.converters.checkpoint import Checkpoint
from qrank.converters.probes import probe_pairs
from qrank.encoding import Encoder
from qrank.errors import ConversionError, FidelityError, TargetError
from qrank.extras import need
from qrank.family import Family
from qrank.fidelity import TOLERANCES, Fidelity
from qrank.work import Logits, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 512
"""Longest probe: every length behaves alike beyond, and the reference is slow."""


def encode_pairs(pairs: list[tuple[str, str]], tokenizer: Path, family: Family) -> Work:
    """Pairs as token ids, made by qrank's own encoder; long ones are cut."""
    encoder = Encoder(tokenizer, family, max_length=min(family.max_length, PROBE_TOKENS))
    sequences, segments = [], []
    for query, document in pairs:
        query_ids, (ids,) = encoder.query(query), encoder.ids([document])
        sequence, types = encoder.pair(query_ids, ids[: encoder.room(query_ids)])
        sequences.append(sequence)
        if types is not None:
            segments.append(types)
    return Work(sequences, segments or None)


def check_ids(pairs: list[tuple[str, str]], work: Work, checkpoint: Checkpoint) -> None:
    """Hold encoded pairs against transformers' tokenizer.

    Raises:
        ConversionError: the two differ: the card's template is not this checkpoint's.
    """
    family = checkpoint.family
    limit = min(family.max_length, PROBE_TOKENS)
    for (query, document), sequence in zip(pairs, work.sequences, strict=True):
        # As a batch of one: a single empty document would count as no document at all.
        (theirs,) = checkpoint.tokenizer(
            [query], [document], truncation="only_second", max_length=limit
        )["input_ids"]
        if sequence.tolist() != theirs:
            raise ConversionError(
                f"family {family.name} reads {query!r}, {document[:40]!r} as other token ids than "
                f"the checkpoint's own tokenizer: {sequence.tolist()} and {theirs}; "
                "give the right card with --family FILE.toml"
            )


def run_reference(model: PreTrainedModel, work: Work) -> Logits:
    """Logits of transformers' own forward pass in fp32, one pair at a time, shape [n]."""
    torch = need("torch")
    logits = []
    with torch.inference_mode():
        for i, sequence in enumerate(work.sequences):
            inputs = {"input_ids": torch.tensor(sequence[None], dtype=torch.int64)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if work.segments is not None:
                types = torch.tensor(work.segments[i][None], dtype=torch.int64)
                inputs["token_type_ids"] = types
            logits.append(model(**inputs).logits.item())
    if not np.isfinite(logits).all():
        raise ConversionError("the checkpoint itself gives scores that are not finite")
    return np.array(logits, np.float32)


def make_probes(checkpoint: Checkpoint, tokenizer: Path) -> Probes:
    """The probe pairs with the reference's logits."""
    pairs = probe_pairs()
    work = encode_pairs(pairs, tokenizer, checkpoint.family)
    check_ids(pairs, work, checkpoint)
    torch, transformers = need("torch"), need("transformers")
    return Probes(
        work,
        run_reference(checkpoint.load(), work),
        f"{checkpoint.family.architecture}, fp32, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    )


def measure(folder: Path, variant: Variant, probes: Probes) -> Fidelity:
    """Run a variant on the probes with the backend that will run it.

    Raises:
        FidelityError: it is further from the reference than its precision may be.
        ConversionError: it does not load or run at all.
    """
    try:
        backend = opener(variant.format)(folder, variant, "cpu", Options(processors()))
        try:
            logits = backend.logits(probes.work)
        finally:
            backend.close()
    except TargetError as error:
        raise ConversionError(f"{variant.name} was made but does not run: {error}") from error
    fidelity = Fidelity.of(logits, probes.logits)
    if missed := TOLERANCES[variant.precision].shortfall(fidelity):
        raise FidelityError(
            f"{variant.name} does not rank like the original: {missed} "
            f"(spread of the reference {fidelity.spread:.4g}); nothing was written"
        )
    return fidelity
