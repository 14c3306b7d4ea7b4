"""clients/js reads and scores as Python does; its other tests are in its own folder."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_texts import odd_texts
from sentencepiece import sentencepiece_model_pb2
from test_tokenizers import XLM_ROBERTA, pieces
from tokenizers import normalizers, pre_tokenizers

from qrank import Reranker
from qrank.bundle.family import Family
from qrank.bundle.locate import locate
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.scoring.encoding import encode_in_steps
from qrank.scoring.pair_tokenizer import PairTokenizer

PACKAGE = Path(__file__).parent.parent / "clients" / "js"

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="no node"),
    pytest.mark.skipif(
        not (PACKAGE / "node_modules" / "onnxruntime-node").exists(),
        reason="no npm packages: make test-js",
    ),
]

SPECIAL = [
    *("[SEP]", "[CLS] a [SEP] b [SEP]", "[UNK][PAD][MASK]", "</s>", "<s>a</s></s>b", "<mask> a"),
    *("<unk>", "<pad>", "<|endoftext|>", "|||IP_ADDRESS|||", " |||EMAIL_ADDRESS||| ", "##s"),
    *("a\ud800b", "\udc00", "x" * 100, "x" * 101, "a" + " " * 30 + "b", "red " * 3000),
]

TEXTS = [*SPECIAL, *odd_texts(500 - len(SPECIAL))]


def in_node(*tasks: dict[str, Any]) -> list[Any]:
    """Run tasks of clients/js/test/compare.js."""
    command = ["node", str(PACKAGE / "test" / "compare.js")]
    done = subprocess.run(command, input=json.dumps(tasks).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found: list[Any] = json.loads(done.stdout)
    return found


PAIRS = [(TEXTS[7 * i % len(TEXTS)], text) for i, text in enumerate(TEXTS)]


def check_inputs(tokenizer: str, family: Family) -> list[str]:
    """Compare the inputs of all pairs; return the warnings about long queries."""
    task = {"task": "inputs", "tokenizer": tokenizer, "family": family.to_json(), "pairs": PAIRS}
    (encoded,) = in_node(task)
    (expected,) = encode_in_steps(PairTokenizer(tokenizer, family), PAIRS, [len(PAIRS)])
    for pair, theirs, ours in zip(PAIRS, encoded["inputs"], expected, strict=True):
        assert theirs["ids"] == ours.ids.tolist(), pair
        segments = None if ours.segments is None else ours.segments.tolist()
        assert theirs["segments"] == segments, pair
        assert theirs["truncated"] == ours.truncated, pair
    warnings: list[str] = encoded["warnings"]
    return warnings


def test_ids_of_mini_are_pythons() -> None:
    bundle = locate("mini")
    warnings = check_inputs(bundle.tokenizer.read_text("utf-8"), bundle.manifest.family)
    assert any("only its first 381 are read" in warning for warning in warnings)


@pytest.mark.parametrize("kind", ["xlm-roberta", "modernbert-mean"])
def test_ids_of_other_tokenizers_are_pythons(
    kind: str, checkpoint_of: Callable[[str], Path]
) -> None:
    """Unigram and byte-level BPE, also of queries that are cut."""
    checkpoint = read_checkpoint(str(checkpoint_of(kind)))
    assert check_inputs(json.dumps(checkpoint.text_tokenizer()), checkpoint.family)


def test_scores_are_pythons() -> None:
    bundle = locate("mini")
    # Beginnings, so that the model has less to do.
    pairs = [(query[:50], document[:50]) for query, document in PAIRS]
    (found,) = in_node({"task": "logits", "bundle": str(bundle.folder), "pairs": pairs})
    with Reranker(bundle, backend="onnx", threads=1) as reranker:
        logits = reranker.score(pairs, raw=True)
        scores = reranker.score(pairs[:20])
    assert np.ptp(logits) > 1
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-4)


def test_scores_in_chromium_are_pythons(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """In fp32: in int8, another rounding of the last bit moves some activations by a step."""
    result = convert(str(checkpoint_of("bert")), [("onnx", "fp32")], tmp_path / "tiny-qrank")
    assert not result.failed
    pairs = PAIRS[:100]
    task = {"task": "browser", "bundle": str(tmp_path / "tiny-qrank"), "pairs": pairs}
    (found,) = in_node(task)
    if found is None:
        pytest.skip("no Chromium: install it as /usr/bin/chromium, or set CHROMIUM")
    with Reranker(tmp_path / "tiny-qrank", threads=1) as reranker:
        logits = reranker.score(pairs, raw=True)
    assert np.ptp(logits) > 1
    np.testing.assert_allclose(found, logits, atol=1e-4)


def test_sentencepieces_charsmap() -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces(XLM_ROBERTA))
    charsmap = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    text = "\n".join(TEXTS).encode("utf-8", "replace").decode()
    config = json.loads(charsmap.__getstate__())
    ((found,),) = in_node({"task": "normalized", "configs": [config], "text": text})
    assert found == charsmap.normalize_str(text)


def test_every_character_is_read_as_in_python() -> None:
    """Tables of Unicode differ by version: between engines, and from those of `tokenizers`."""
    points = (point for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    text = "".join(f"a{chr(point)}" for point in points)
    forms: list[Any] = [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD()]
    forms += [normalizers.Lowercase(), normalizers.BertNormalizer()]
    forms += [normalizers.BertNormalizer(lowercase=False, strip_accents=True)]
    cuts: list[Any] = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.WhitespaceSplit()]
    states = [[json.loads(part.__getstate__()) for part in parts] for parts in (forms, cuts)]
    normalized, words = in_node(
        {"task": "normalized", "configs": states[0], "text": text},
        {"task": "words", "configs": states[1], "text": text},
    )
    for form, found in zip(forms, normalized, strict=True):
        assert found == form.normalize_str(text), form
    for pre_tokenizer, found in zip(cuts, words, strict=True):
        expected = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        assert found == expected, pre_tokenizer
