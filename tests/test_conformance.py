"""One test body for every variant of every family: its scores match those of transformers.

`conforms` is called for each kind of tiny checkpoint in each (format, precision):

| kinds | onnx | openvino | gguf | mlx | torch |
|---|---|---|---|---|---|
| encoders: `tiny.CHECKPOINTS` (here, and test_mlx.py) | but int4 | but int4 | all | all | fp32 |
| decoders: `tiny_decoders.CHECKPOINTS` (there) | all | but int8-w8a8 | all | all | fp32 |
| nemotron (its own file) | but int4 | but int4 | all | but int4 | fp32 |
| encoders: `tiny_encoders.CHECKPOINTS` (test_encoders.py) | int8 | int8 | q8_0 | int8 | fp32 |
| Qwen3.5 (test_qwen3_5.py) | none | none | f16 | none | none |
| encoder-decoders (test_t5.py) | fp32, fp16, int8 | fp16, int8 | none | none | fp32 |

"All" is what the backends declare (`qrank.backends.formats`); openvino's int8-w8a8 is left out on
CPUs without VNNI, where it is refused. Pairs scored together, alone, in reverse order and by many
threads at once are compared with transformers' own forward pass in fp32. A new precision needs a
row in ALONE.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qrank import Reranker
from qrank.backends import tolerance
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.sequences import Logits
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.scoring.batching import CPU_BATCHES, cut_padded

ALONE = {
    "fp32": 1e-5,
    "fp16": 5e-3,
    "int8": 0.02,
    "int8-w8a8": 0.02,
    "int4": 0.02,
    "f16": 1e-5,
    "q8_0": 1e-5,
    "q4_k_m": 1e-5,
}
"""Precision -> how much a logit may change with its batch, as a share of max(1, spread)."""

FEW = ((3, 9, 17), (9,))
"""Indices of the pairs in the requests of the concurrent threads."""


def ragged_pairs() -> list[tuple[str, str]]:
    """Pairs from empty to beyond the limit, most of them short enough to share a batch."""
    chance = random.Random(7)
    words = [word for pair in probe_pairs() for text in pair for word in text.split()]
    sizes = [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 25, 30, 40, 50, 70, 300]
    pairs = [("", "")]
    for size in sizes:
        query = " ".join(chance.choices(words, k=chance.randint(1, 4)))
        pairs.append((query, " ".join(chance.choices(words, k=size))))
    return pairs


PAIRS = ragged_pairs()


@cache
def reference(folder: Path) -> tuple[Logits, tuple[int, ...]]:
    """Logits and lengths of PAIRS from transformers' own tokenizer and model, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits, lengths = [], []
    for query, document in PAIRS:
        # Use a batch of one: without a batch, an empty document counts as no document.
        inputs = tokenizer(
            [query],
            [document],
            truncation="only_second",
            max_length=tiny.MAX_LENGTH,
            return_tensors="pt",
        )
        with torch.inference_mode():
            (row,) = model(**inputs).logits
        # Of two labels, the second means relevant: the logarithm of the odds.
        logits.append((row[-1] - row[:-1].sum()).item())
        lengths.append(inputs["input_ids"].shape[1])
    return np.array(logits, np.float32), tuple(lengths)


def shared(lengths: tuple[int, ...]) -> int:
    """Number of CPU batches with sequences of different lengths, which test padding."""
    found = [{lengths[i] for i in batch} for batch in cut_padded(lengths, CPU_BATCHES[0])]
    return sum(len(batch) > 1 for batch in found)


@pytest.mark.parametrize("row", tiny.VARIANTS, ids="-".join)
def test_conformance(
    kind: str,
    row: tuple[str, str],
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
) -> None:
    theirs, lengths = reference(checkpoint_of(kind))
    assert min(lengths) <= 4
    assert max(lengths) == tiny.MAX_LENGTH
    assert shared(lengths) > 2
    conforms(bundle_of(kind), "-".join(row), PAIRS, theirs, ALONE, **exactly(row))


def test_the_original_conforms(kind: str, checkpoint_of: Callable[[str], Path]) -> None:
    """With backend torch, which needs no conversion."""
    theirs, _ = reference(checkpoint_of(kind))
    conforms(checkpoint_of(kind), "torch-fp32", PAIRS, theirs, ALONE)


def exactly(row: tuple[str, str]) -> dict[str, str | None]:
    """The option for fp32, which fp16's bounds are for: bf16 has others, on CPUs that have it."""
    return {"compute_dtype": "fp32"} if row == ("openvino", "fp16") else {}


def conforms(
    model: Path,
    backend: str,
    pairs: list[tuple[str, str]],
    theirs: Logits,
    alone_bounds: dict[str, float],
    requests: int = 64,
    /,
    **options: str | None,
) -> None:
    """Assert that `model` on `backend` scores pairs like the reference, in any batch.

    `requests` is how many come at once.
    """
    format, _, precision = backend.partition("-")
    scale = max(1.0, float(np.ptp(theirs)))
    assert np.ptp(theirs) > 1, "the reference's order means nothing"

    with Reranker(model, backend=backend, threads=2, **options) as reranker:  # type: ignore[arg-type]
        together = reranker.score(pairs, raw=True)
        alone = np.concatenate([reranker.score([pair], raw=True) for pair in pairs])
        backwards = reranker.score(pairs[::-1], raw=True)[::-1]
        # Include a single pair, for which a backend may take every idle thread.
        places = FEW * (requests // len(FEW))
        few = [[pairs[i % len(pairs)] for i in some] for some in places]
        with ThreadPoolExecutor(requests) as threads:
            crowd = list(threads.map(lambda some: reranker.score(some, raw=True), few))

    assert together.dtype == np.float32
    for way, found in {"together": together, "alone": alone, "backwards": backwards}.items():
        missed = tolerance(format, precision).shortfall(Fidelity.of(found, theirs))
        assert missed is None, f"{backend}, {way}: {missed}"
    bound = alone_bounds[precision] * scale
    company = "a logit depends on the pairs beside it"
    np.testing.assert_allclose(alone, together, rtol=0, atol=bound, err_msg=company)
    np.testing.assert_allclose(backwards, together, rtol=0, atol=bound, err_msg=company)
    for found, some in zip(crowd, places, strict=True):
        expected = together[[i % len(pairs) for i in some]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=company)
