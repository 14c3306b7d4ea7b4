"""Published scores of real checkpoints, converted to fp32 from the hub.

Run with `QRANK_TEST_HUB=1 python -m pytest -m network`: downloads up to 2 GB per model.
"""

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qrank import Reranker
from qrank.converters.convert import convert

pytestmark = pytest.mark.network


@dataclass(frozen=True)
class Golden:
    """Scores of a model, published by a widely used project.

    Attributes:
        model: hub id.
        query, documents: the scored texts.
        scores: the published scores.
        scale: `logit`, `sigmoid` if the source applied one, or `score` for the family's own
            activation.
        atol: absolute tolerance, given the source's own precision (for example bf16).
    """

    model: str
    query: str
    documents: tuple[str, ...]
    scores: tuple[float, ...]
    scale: str
    atol: float


RED_PLANET = (
    "Which planet is known as the Red Planet?",
    (
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    ),
)
FRANCE = (
    "What is the capital of France?",
    ("Paris is the capital of France.", "Berlin is the capital of Germany."),
)
DEEP_LEARNING = ("What is Deep Learning?", ("Deep Learning is not...",))

GOLDENS = [
    # sentence-transformers, tests/cross_encoder/test_pretrained.py, in bf16. Smallest first.
    Golden(
        "cross-encoder-testing/reranker-bert-tiny-gooaq-bce",
        *RED_PLANET,
        (0.29297, 0.9375, 0.82031, 0.91016),
        "sigmoid",
        0.02,
    ),
    Golden(
        "cross-encoder/ms-marco-TinyBERT-L2-v2",
        *RED_PLANET,
        (-10.875, 7.0, 5.875, 5.6875),
        "logit",
        0.1,
    ),
    Golden(
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        *RED_PLANET,
        (-6.53125, 9.6875, 6.90625, 6.6875),
        "logit",
        0.1,
    ),
    Golden(
        "cross-encoder/ms-marco-MiniLM-L12-v2",
        *RED_PLANET,
        (-7.15625, 9.5, 5.71875, 6.84375),
        "logit",
        0.1,
    ),
    Golden(
        "cross-encoder/mmarco-mMiniLMv2-L12-H384-v1",
        *RED_PLANET,
        (-3.28125, 10.1875, 3.4375, 7.46875),
        "logit",
        0.1,
    ),
    Golden(
        "Alibaba-NLP/gte-reranker-modernbert-base",
        *RED_PLANET,
        (0.80859, 0.95312, 0.875, 0.91797),
        "sigmoid",
        0.02,
    ),
    Golden(
        "BAAI/bge-reranker-base",
        *RED_PLANET,
        (0.87891, 0.99609, 0.99609, 0.05029),
        "sigmoid",
        0.02,
    ),
    Golden(
        "BAAI/bge-reranker-large",
        *RED_PLANET,
        (0.69922, 1.0, 0.97266, 0.81641),
        "sigmoid",
        0.02,
    ),
    Golden(
        "BAAI/bge-reranker-v2-m3",
        *RED_PLANET,
        (0.01855, 1.0, 0.78906, 0.98828),
        "sigmoid",
        0.02,
    ),
    Golden(
        "zeroentropy/zerank-1-small",
        *RED_PLANET,
        (0.09428, 0.83889, 0.12052, 0.2184),
        "score",
        0.02,
    ),
    # sentence-transformers, tests/cross_encoder/test_model.py, in fp32 with its template.
    Golden(
        "Qwen/Qwen3-Reranker-0.6B",
        *RED_PLANET,
        (-3.109297752380371, 7.120389938354492, -0.3787546157836914, 3.541637420654297),
        "logit",
        0.001,
    ),
    # fastembed, tests/test_text_cross_encoder.py, ONNX in fp32. Its scores are those of
    # Xenova's ONNX copies; these are the checkpoints that the copies were made from.
    Golden("cross-encoder/ms-marco-MiniLM-L6-v2", *FRANCE, (8.500708, -2.541011), "logit", 0.01),
    Golden("cross-encoder/ms-marco-MiniLM-L12-v2", *FRANCE, (9.330912, -2.0380247), "logit", 0.01),
    Golden("BAAI/bge-reranker-base", *FRANCE, (6.15733337, -3.65939403), "logit", 0.01),
    # text-embeddings-inference, backends/candle/tests/snapshots.
    Golden("Alibaba-NLP/gte-reranker-modernbert-base", *DEEP_LEARNING, (2.13616,), "logit", 0.02),
]


@pytest.fixture(scope="module")
def hub() -> None:
    """Skip unless the hub is enabled and can be reached."""
    if os.environ.get("QRANK_TEST_HUB") != "1":
        pytest.skip("downloads models of up to 2 GB: set QRANK_TEST_HUB=1 to run")
    try:
        urllib.request.urlopen("https://huggingface.co", timeout=5).close()
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"the Hugging Face hub cannot be reached: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("goldens")


@cache
def converted(model: str, folder: Path) -> Path:
    """A model's bundle, converted once."""
    return convert(model, [("onnx", "fp32")], folder / model.replace("/", "--")).folder


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{g.model}-{len(g.documents)}")
def test_published_scores(golden: Golden, folder: Path) -> None:
    with Reranker(converted(golden.model, folder)) as reranker:
        pairs = [(golden.query, document) for document in golden.documents]
        logits = reranker.score(pairs, raw=True).astype(np.float64)
        scores = reranker.score(pairs)
    found = {"logit": logits, "sigmoid": 1 / (1 + np.exp(-logits)), "score": scores}[golden.scale]
    np.testing.assert_allclose(found, golden.scores, rtol=0, atol=golden.atol)
