"""Checkpoints that are read as another class score exactly as the original computation."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rewritten
from test_conformance import PAIRS
from tiny_chains import ACTIVATIONS, ETTIN, PLAIN, chain
from transformers import Qwen3VLForConditionalGeneration

from qrank import Reranker
from qrank.backends import tolerance
from qrank.bundle.fidelity import Fidelity
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError

Folders = Callable[[str], Path]


@pytest.mark.parametrize(
    ("kind", "kinds", "options"),
    [
        ("modernbert-mean", ETTIN, {}),
        ("modernbert-mean", ETTIN, {"bias": True, "activation": "Tanh"}),
        ("modernbert-mean", ETTIN, {"pooling": {"pooling_mode_mean_tokens": True}}),
        ("bert", PLAIN, {"bias": True, "activation": "Tanh"}),
        ("xlm-roberta", PLAIN, {"bias": True, "activation": "Tanh"}),
    ],
)
def test_a_chain_of_modules_scores_as_its_modules_do(
    kind: str, kinds: list[str], options: dict[str, Any], checkpoint_of: Folders, tmp_path: Path
) -> None:
    made = chain(checkpoint_of(kind), tmp_path / "chain", kinds, **options)
    with Reranker(made.folder, backend="torch") as reranker:
        ours = reranker.score(PAIRS, raw=True)
        assert reranker.engine.manifest.family.activation == "identity"
    theirs = made.logits(PAIRS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, float(np.ptp(theirs))))


def test_ettin_converts(checkpoint_of: Folders, tmp_path: Path) -> None:
    """To every format of its class; which precision does not matter to a rewriting."""
    made = chain(checkpoint_of("modernbert-mean"), tmp_path / "ettin", ETTIN)
    theirs = made.logits(PAIRS)
    variants = [("onnx", "int8"), ("openvino", "int8"), ("gguf", "q8_0")]
    bundle = convert(str(made.folder), variants, tmp_path / "bundle")
    assert re.match(
        r"a chain of modules .* read as ModernBertForSequenceClassification, fp32",
        bundle.manifest.probes.reference,
    )
    for variant in variants:
        with Reranker(bundle.folder, backend="-".join(variant)) as reranker:
            ours = reranker.score(PAIRS, raw=True)
        assert tolerance(*variant).shortfall(Fidelity.of(ours, theirs)) is None


@pytest.mark.parametrize(
    ("kinds", "name", "content", "message"),
    [
        (ETTIN, "2_Dense", {"use_residual": True}, "2_Dense with use_residual"),
        (ETTIN, "2_Dense", {"activation_function": "my.Own"}, "activation_function = 'my.Own'"),
        (ETTIN, "4_Dense", {"activation_function": ACTIVATIONS + "Tanh"}, "the activation tanh"),
        (ETTIN, "1_Pooling", {"pooling_mode": "max"}, "pooling max for ModernBertModel"),
        (ETTIN, "1_Pooling", {"include_prompt": False}, "include_prompt = false"),
        (ETTIN, "", {"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        (ETTIN, "", {"architectures": ["MPNetModel"]}, "Transformer of class MPNetModel"),
        (PLAIN, "", {}, "expected Transformer, Pooling, Dense, LayerNorm, Dense"),
    ],
)
def test_a_chain_that_no_class_computes_is_refused(
    kinds: list[str],
    name: str,
    content: dict[str, Any],
    message: str,
    checkpoint_of: Folders,
    tmp_path: Path,
) -> None:
    folder = chain(checkpoint_of("modernbert-mean"), tmp_path / "chain", kinds).folder
    tiny.edit_config(folder / name, **content)
    with pytest.raises(FamilyError, match=re.escape(message)):
        read_checkpoint(str(folder))


def test_a_module_without_its_file_is_told(checkpoint_of: Folders, tmp_path: Path) -> None:
    folder = chain(checkpoint_of("modernbert-mean"), tmp_path / "chain", ETTIN).folder
    (folder / "4_Dense" / "model.safetensors").unlink()
    with pytest.raises(FamilyError, match=r"4_Dense has no model\.safetensors"):
        read_checkpoint(str(folder))
    (folder / "4_Dense" / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"4_Dense.config\.json is missing"):
        read_checkpoint(str(folder))


# jina-reranker-v2


def test_jina_v2_scores_exactly_as_the_model_it_was_made_of(
    checkpoint_of: Folders, tmp_path: Path
) -> None:
    theirs = checkpoint_of("xlm-roberta")
    ours = tiny_rewritten.jina_v2(theirs, tmp_path / "jina")
    with Reranker(theirs, backend="torch") as original, Reranker(ours, backend="torch") as read:
        np.testing.assert_array_equal(original.score(PAIRS, raw=True), read.score(PAIRS, raw=True))
    assert read_checkpoint(str(ours)).read_as.startswith("jina-reranker-v2 read as XLMRoberta")


def test_jina_v2_converts_to_gguf(checkpoint_of: Folders, tmp_path: Path) -> None:
    """GGUF is written from the stored tensors, here parts of them, without transformers' class."""
    theirs = checkpoint_of("xlm-roberta")
    ours = tiny_rewritten.jina_v2(theirs, tmp_path / "jina")
    made = convert(str(ours), [("gguf", "f16")], tmp_path / "bundle")
    with Reranker(made.folder) as read, Reranker(theirs, backend="torch") as original:
        expected = original.score(PAIRS, raw=True)
        found = Fidelity.of(read.score(PAIRS, raw=True), expected)
    assert tolerance("gguf", "f16").shortfall(found) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"position_embedding_type": "rotary"}, "position_embedding_type = 'rotary'"),
        ({"lora_adaptations": ["retrieval"]}, "lora_adaptations"),
    ],
)
def test_other_models_of_jinas_class_are_refused(
    content: dict[str, Any], message: str, checkpoint_of: Folders, tmp_path: Path
) -> None:
    folder = tiny_rewritten.jina_v2(checkpoint_of("xlm-roberta"), tmp_path / "jina")
    tiny.edit_config(folder, **content)
    with pytest.raises(FamilyError, match=message):
        read_checkpoint(str(folder))


def test_jina_v1_as_published_scores_as_its_class_does(
    checkpoint_of: Folders, tmp_path: Path
) -> None:
    theirs = checkpoint_of("jina-reranker-v1")
    ours = shutil.copytree(theirs, tmp_path / "jina")
    code = {"AutoConfig": "jinaai/jina-bert-implementation--configuration_bert.JinaBertConfig"}
    tiny.edit_config(
        ours,
        architectures=["JinaBertForMaskedLM"],
        auto_map=code,
        feed_forward_type="geglu",
        id2label=None,
        label2id=None,
        model_type="bert",
        position_embedding_type="alibi",
    )
    with Reranker(theirs, backend="torch") as original, Reranker(ours, backend="torch") as read:
        np.testing.assert_array_equal(original.score(PAIRS, raw=True), read.score(PAIRS, raw=True))
    tiny.edit_config(ours, feed_forward_type="original")
    with pytest.raises(FamilyError, match="feed_forward_type = 'original'"):
        read_checkpoint(str(ours))


# Decoders


def test_minicpm_converts(checkpoint_of: Folders, tmp_path: Path) -> None:
    """Its exactness is shown in test_oracles.py; here its prompt, cut layers and scales."""
    folder = tiny_rewritten.minicpm(checkpoint_of("gemma"), tmp_path / "minicpm")
    variants = [("onnx", "fp32"), ("openvino", "fp16"), ("gguf", "f16")]
    made = convert(str(folder), variants, tmp_path / "bundle")
    assert made.manifest.family.name == "bge-reranker-gemma"
    pairs = [pair for pair in PAIRS if len(pair[1]) < 200]
    with Reranker(folder, backend="torch") as original:
        expected = original.score(pairs, raw=True)
    for variant in variants:
        with Reranker(made.folder, backend="-".join(variant)) as reranker:
            found = Fidelity.of(reranker.score(pairs, raw=True), expected)
        assert tolerance(*variant).shortfall(found) is None, variant


def test_qwen3_vl_scores_text_as_its_own_class_does(tmp_path: Path) -> None:
    folder = tiny_rewritten.qwen3_vl(tmp_path / "vl")
    pairs = [pair for pair in PAIRS if len(pair[1]) < 200]
    checkpoint = read_checkpoint(str(folder))
    expected = tiny_rewritten.own_logits(checkpoint, Qwen3VLForConditionalGeneration, pairs)
    with Reranker(folder, backend="torch") as reranker:
        ours = reranker.score(pairs, raw=True)
    np.testing.assert_allclose(ours, expected, atol=2e-5 * max(1.0, float(np.ptp(expected))))
    assert checkpoint.read_as == "the text part of Qwen3-VL read as Qwen3ForCausalLM"
