"""Run the fp32 reference, and hold every variant against it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrank import isolation
from qrank.backends import Options, module, opener
from qrank.bundle import Probes, Variant
from qrank.child import NoChildError
from qrank.converters.checkpoint import Checkpoint
from qrank.converters.configuration import explained
from qrank.converters.probes import probe_pairs
from qrank.encoding import Encoder
from qrank.errors import ConversionError, FidelityError, TargetError
from qrank.extras import need
from qrank.family import Family, fill
from qrank.fidelity import Fidelity, tolerance
from qrank.machine import processors
from qrank.work import Logits, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qrank")

PROBE_TOKENS = 512
"""Longest probe: every length behaves alike beyond, and the reference is slow."""


def encode_pairs(pairs: list[tuple[str, str]], tokenizer: Path | str, family: Family) -> Work:
    """Pairs as token ids, made by qrank's own encoder; long ones are cut."""
    encoder = Encoder(tokenizer, family, max_length=min(family.max_length, PROBE_TOKENS))
    sequences, segments = [], []
    for query, document in pairs:
        sequence, types = encoder.whole(query, document)
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
        theirs = checkpoint_ids(checkpoint, query, document, limit)
        if sequence.tolist() != theirs:
            raise ConversionError(
                f"family {family.name} reads {query!r}, {document[:40]!r} as other token ids than "
                f"the checkpoint's own tokenizer: {sequence.tolist()} and {theirs}; "
                "give the right card with --family FILE.toml"
            )


def checkpoint_ids(checkpoint: Checkpoint, query: str, document: str, limit: int) -> list[int]:
    """A pair as the checkpoint's own tokenizer reads it, cut to a limit.

    For a decoder family, the items of its template each by itself, as the original code does; a
    prompt that an encoder family reads as a whole.
    """
    family, tokenizer = checkpoint.family, checkpoint.tokenizer
    template, text = family.asked(None)
    texts = {"query": query, "document": document, "instruction": text}
    prompt = [fill(item, **texts) for item in template if isinstance(item, str)]
    places = [place for place, item in enumerate(template) if isinstance(item, str)]
    if not family.decoder and places[1] == places[0] + 1:
        whole = "".join(prompt)
        return list(tokenizer(whole, truncation=True, max_length=limit)["input_ids"])
    if not family.decoder:
        # As a batch of one: a single empty document would count as no document at all.
        query, document = prompt
        with explained(f"{checkpoint.name}: its tokenizer cannot cut a pair to {limit} tokens"):
            (pair,) = tokenizer([query], [document], truncation="only_second", max_length=limit)[
                "input_ids"
            ]
        return list(pair)
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


def run_reference(model: PreTrainedModel, work: Work, labels: tuple[int, ...] = ()) -> Logits:
    """Logits of transformers' own forward pass in fp32, one pair at a time, shape [n].

    Args:
        model: transformers' own.
        work: whole sequences.
        labels: of a causal language model, see `qrank.family.Family`.
    """
    torch = need("torch")
    logits = []
    with torch.inference_mode():
        for i, sequence in enumerate(work.sequences):
            inputs = {"input_ids": torch.tensor(sequence[None], dtype=torch.int64)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if work.segments is not None:
                types = torch.tensor(work.segments[i][None], dtype=torch.int64)
                inputs["token_type_ids"] = types
            if labels:
                # The vocabulary's logits at the last token.
                last = model(**inputs, logits_to_keep=1).logits[0, -1].double()
                logits.append((last[labels[0]] - sum(last[i] for i in labels[1:])).item())
            else:
                logits.append(model(**inputs).logits.item())
    if not np.isfinite(logits).all():
        raise ConversionError("the checkpoint itself gives scores that are not finite")
    return np.array(logits, np.float32)


def make_probes(checkpoint: Checkpoint, tokenizer: Path) -> Probes:
    """The probe pairs with the reference's logits."""
    pairs = probe_pairs(checkpoint.words)
    work = encode_pairs(pairs, tokenizer, checkpoint.family)
    check_ids(pairs, work, checkpoint)
    torch, transformers = need("torch"), need("transformers")
    return Probes(
        work,
        run_reference(checkpoint.load(lean=True), work, checkpoint.family.labels),
        f"{checkpoint.family.architecture}, fp32, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    )


def own_probes(
    checkpoint: Checkpoint,
    tokenizer: Path,
    folder: Path,
    variant: Variant,
    worker: isolation.Worker,
) -> Probes:
    """The probe pairs with a ready-made model's own logits: of each pair alone, computed exactly.

    Raises:
        ConversionError: it does not load or run, or gives no scores.
    """
    pairs = probe_pairs(checkpoint.words)
    work = encode_pairs(pairs, tokenizer, checkpoint.family)
    check_ids(pairs, work, checkpoint)
    singles = [work.take(np.array([i])) for i in range(len(work))]
    logits = np.concatenate(_run(folder, variant, singles, worker))
    if not np.isfinite(logits).all() or not np.ptp(logits):
        raise ConversionError(
            f"the ready-made {variant.name} does not tell pairs apart: its logits run from "
            f"{logits.min():.4g} to {logits.max():.4g}. It lacks its score head, or is another "
            "family's (--family)"
        )
    runtime = module(variant.format).version()
    return Probes(work, logits, f"the ready-made {variant.name} itself, {runtime}", verified=False)


def measure(folder: Path, variant: Variant, probes: Probes, worker: isolation.Worker) -> Fidelity:
    """Run a variant on the probes with the backend that will run it.

    Args:
        folder: the bundle.
        variant: of it.
        probes: what it is held against.
        worker: where a native library may crash.

    Raises:
        FidelityError: it is further from the reference than its precision may be.
        ConversionError: it does not load or run at all.
    """
    (logits,) = _run(folder, variant, [probes.work], worker)
    fidelity = Fidelity.of(logits, probes.logits)
    if missed := tolerance(variant.precision).shortfall(fidelity):
        like = "the original" if probes.verified else probes.reference
        raise FidelityError(
            f"{variant.name} does not rank like {like}: {missed} "
            f"(spread of the reference {fidelity.spread:.4g})"
        )
    return fidelity


def _run(
    folder: Path, variant: Variant, works: list[Work], worker: isolation.Worker
) -> list[Logits]:
    """Logits of each work by the backend of a variant, in its most exact arithmetic.

    In a process of its own where a native library could end this one.
    """
    options = Options(processors())
    try:
        if isolation.advised(variant.format, "cpu"):
            try:
                return worker.logits(folder, variant, works, options)
            except NoChildError as error:
                log.warning("%s: so %s is tried in this one", error, variant.name)
        backend = opener(variant.format)(folder, variant, "cpu", options)
        try:
            return [backend.logits(work) for work in works]
        finally:
            backend.close()
    except TargetError as error:
        raise ConversionError(f"{variant.name} was made but does not run: {error}") from error
