"""Effects only beyond the longest probe: sliding windows and length-dependent position scaling."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import tiny_decoders
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qrank import Reranker
from qrank.bundle.sequences import Logits, Sequences
from qrank.converters.checkpoint.ids import PROBE_TOKENS
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.converters.gguf import export
from qrank.errors import ConversionError, FamilyError, TargetError
from qrank.scoring.pair_tokenizer import PairTokenizer

LENGTH = 700
WINDOW = 560
assert PROBE_TOKENS < WINDOW < LENGTH
SIZES = {**tiny_decoders.SIZES, "max_position_embeddings": LENGTH}
LLAMA = tiny_decoders.FAMILIES["llama"]
DOCUMENTS = [
    "the moon and the tide " * 90,
    "mars is red " * 200,
    "the red planet is mars " * 150,
    "a",
]
PAIRS = [("why", document) for document in DOCUMENTS]


def reference(folder: Path, family: str) -> Logits:
    """Logits from transformers' own forward pass, one whole pair at a time."""
    checkpoint = read_checkpoint(str(folder), family=family)
    tokenizer = PairTokenizer(json.dumps(checkpoint.text_tokenizer()), checkpoint.family)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for query, document in PAIRS:
        ids, _ = tokenizer.whole(query, document)
        with torch.inference_mode():
            last = model(input_ids=torch.tensor(ids[None], dtype=torch.int64)).logits[0, -1]
        yes, *no = (last[label].item() for label in checkpoint.family.labels)
        found.append(yes - sum(no))
    return np.array(found, np.float32)


def logits(model: Path, backend: str, family: str | None = None) -> Logits:
    with Reranker(model, backend=backend, family=family, threads=1) as reranker:
        return np.asarray(reranker.score(PAIRS, raw=True))


def qwen3(folder: Path, **changes: Any) -> Path:
    config = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
    tiny_decoders.save(folder, Qwen3ForCausalLM, config)
    tiny.edit_config(folder, **changes)
    return folder


SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]}


ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
SHORT = 300
ROPES = {
    "linear": {**ROPE, "rope_type": "linear"},
    "dynamic": {**ROPE, "rope_type": "dynamic"},
    "yarn": {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": SHORT},
    "longrope": {
        **ROPE,
        "rope_type": "longrope",
        "original_max_position_embeddings": SHORT,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
}


def test_a_window_changes_what_these_documents_score(tmp_path: Path) -> None:
    plain, windowed = qwen3(tmp_path / "a"), qwen3(tmp_path / "b", **MIXED)
    apart = np.abs(reference(plain, "qwen3-reranker") - reference(windowed, "qwen3-reranker"))
    assert apart[:3].min() > 1e-2
    assert apart[3] < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        MIXED,
        {**SLIDING, "max_window_layers": 1, "layer_types": None},
        {**SLIDING, "sliding_window": 48, "layer_types": ["sliding_attention"] * 2},
        {**MIXED, "sliding_window": LENGTH},
        {"sliding_window": 48, "layer_types": None},
    ],
    ids=["mixed", "max_window_layers", "short", "no shorter than a pair", "unused"],
)
def test_qwen3_sees_its_window(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = qwen3(tmp_path / "model", **changes)
    np.testing.assert_allclose(
        logits(folder, "torch", "qwen3-reranker"), reference(folder, "qwen3-reranker"), atol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "config", "family"),
    [
        (
            Qwen2ForCausalLM,
            Qwen2Config(**SIZES, **SLIDING, max_window_layers=1, tie_word_embeddings=True),
            "mxbai-rerank-v2",
        ),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW), LLAMA),
    ],
    ids=["qwen2", "mistral"],
)
def test_other_models_see_their_window(
    kind: type[PreTrainedModel], config: PretrainedConfig, family: str, tmp_path: Path
) -> None:
    folder = tiny_decoders.save(tmp_path / "model", kind, config)
    np.testing.assert_allclose(
        logits(folder, "torch", family), reference(folder, family), atol=1e-4
    )


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with sliding windows and longrope, whose scale transformers chooses at run time."""
    longrope = {**ROPES["longrope"], "original_max_position_embeddings": LENGTH}
    folder = tmp_path_factory.mktemp("windowed") / "model"
    return qwen3(folder, **MIXED, rope_parameters=longrope)


def test_an_exported_graph_sees_it_too(windowed: Path, tmp_path: Path) -> None:
    """The same graph is for ONNX Runtime and OpenVINO."""
    target = tmp_path / "bundle"
    bundle = convert(str(windowed), [("onnx", "fp32")], target, family="qwen3-reranker").folder
    theirs = reference(windowed, "qwen3-reranker")
    np.testing.assert_allclose(logits(bundle, "onnx-fp32"), theirs, atol=1e-4)


def test_llama_cpp_has_none_and_says_so(windowed: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(windowed), family="qwen3-reranker")
    with pytest.raises(ConversionError, match=f"not to a window of {WINDOW}"):
        export.convert(checkpoint, "f16", tmp_path, Sequences([]))
    assert not list(tmp_path.iterdir())


def test_prebuilt_files_of_a_windowed_model_are_refused(windowed: Path, tmp_path: Path) -> None:
    """The exporter may have dropped the window, and the probes are too short to notice."""
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Constant", [], ["logits"], value_floats=[1.0])
    graph = onnx.helper.make_graph([node], "g", [], [out])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ConversionError, match=f"sliding_window = {WINDOW}.*model.onnx"):
        convert(
            str(tmp_path / "model.onnx"),
            [("onnx", None)],
            tmp_path / "bundle",
            reference=str(windowed),
            family="qwen3-reranker",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window that is in use"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layers of chunked_attention"),
        ({**MIXED, "sliding_window": 0}, "sliding_window = 0"),
        ({**MIXED, "sliding_window": -3}, "sliding_window = -3"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_attention_of_other_kinds_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = qwen3(tmp_path / "model", **changes)
    with pytest.raises((FamilyError, ConversionError), match=message):
        Reranker(folder, backend="torch", family="qwen3-reranker")


def card(folder: Path, max_length: int | None) -> str:
    path = folder / "mine.toml"
    limit = "" if max_length is None else f"max_length = {max_length}\n"
    path.write_text(Path(LLAMA).read_text("utf-8") + limit, "utf-8")
    return str(path)


def test_a_model_whose_window_is_not_built_is_read_up_to_it(tmp_path: Path) -> None:
    """Its soft-capped score is not a row of the output matrix times a hidden state: refused too."""
    config = Gemma2Config(**SIZES, head_dim=16, sliding_window=WINDOW, final_logit_softcapping=2.0)
    folder = tiny_decoders.save(tmp_path / "model", Gemma2ForCausalLM, config)
    with pytest.raises(FamilyError, match=f"sliding_window = {WINDOW}.*max_length = {WINDOW}"):
        Reranker(folder, backend="torch", family=card(tmp_path, None))
    with pytest.raises(TargetError, match="in a way that qrank does not know"):
        Reranker(folder, backend="torch", family=card(tmp_path, WINDOW))


@pytest.mark.parametrize("kind", list(ROPES))
def test_scaled_positions_are_the_originals_at_every_length(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = qwen3(tmp_path / "model", rope_parameters=ROPES[kind])
    with caplog.at_level(logging.WARNING, "qrank"):
        limit = read_checkpoint(str(folder), family="qwen3-reranker").family.max_length
    # Beyond this, longrope scales differently, also for shorter pairs in the same batch.
    assert limit == (SHORT if kind == "longrope" else LENGTH)
    assert ("longrope" in caplog.text) == (kind == "longrope")
    np.testing.assert_allclose(
        logits(folder, "torch", "qwen3-reranker"), reference(folder, "qwen3-reranker"), atol=1e-4
    )
