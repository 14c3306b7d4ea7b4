"""sentence-transformers' settings that affect a checkpoint's scores are read or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_decoders
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qrank import Reranker
from qrank.bundle.manifest import Manifest
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import FamilyError

IDENTITY = "torch.nn.modules.linear.Identity"
SIGMOID = "torch.nn.modules.activation.Sigmoid"
TRANSFORMER = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.base.modules.transformer.Transformer",
}
MODEL = "config_sentence_transformers.json"


@pytest.fixture
def folder(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """Tiny BERT, saved like a CrossEncoder of sentence-transformers 6."""
    folder = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "model"))
    write(folder, "modules.json", [TRANSFORMER])
    write(
        folder,
        "sentence_bert_config.json",
        {
            "transformer_task": "sequence-classification",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "scores",
        },
    )
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), "utf-8")


def said(activation: Any, **more: Any) -> dict[str, Any]:
    return {"model_type": "CrossEncoder", "activation_fn": activation, **more}


@pytest.mark.parametrize(
    ("model", "config", "activation"),
    [
        (said(IDENTITY), {}, "identity"),
        (said(SIGMOID), {"sentence_transformers": {"activation_fn": IDENTITY}}, "sigmoid"),
        (said(IDENTITY), {"sbert_ce_default_activation_function": SIGMOID}, "identity"),
        (said(None), {"sbert_ce_default_activation_function": IDENTITY}, "identity"),
        (said(None), {"sentence_transformers": {"activation_fn": IDENTITY}}, "identity"),
        (said(None), {}, "sigmoid"),
        # Settings of an embedding model; sentence-transformers ignores them for a reranker.
        ({"model_type": "SentenceTransformer", "activation_fn": IDENTITY}, {}, "sigmoid"),
    ],
)
def test_its_activation_comes_before_config_json_and_the_card(
    model: dict[str, Any], config: dict[str, Any], activation: str, folder: Path
) -> None:
    write(folder, MODEL, model)
    tiny.edit_config(folder, **config)
    with Reranker(folder, backend="torch") as reranker:
        assert reranker.engine.manifest.family.activation == activation
        (best, *_) = reranker.rank("red", ["mars", "bread"])
    assert (best.score == best.logit) == (activation == "identity")


def test_its_activation_is_read_without_modules_too(folder: Path) -> None:
    (folder / "modules.json").unlink()
    write(folder, MODEL, said(IDENTITY))
    assert read_checkpoint(str(folder)).family.activation == "identity"


@pytest.mark.parametrize("name", ["torch.nn.modules.activation.Tanh", "evil.Activation"])
def test_an_unknown_activation_is_refused(name: str, folder: Path) -> None:
    write(folder, MODEL, said(name))
    with pytest.raises(FamilyError, match=f"{MODEL} names the activation '{name}'"):
        read_checkpoint(str(folder))


PROMPT = "Find what answers this. "
PAIRS = [("which planet is red?", "Mars is red."), ("?", "bread"), ("", "x")]


def test_its_prompt_stands_before_every_query(folder: Path, tmp_path: Path) -> None:
    prompts = {"query": PROMPT, "other": "unused"}
    write(folder, MODEL, said(IDENTITY, prompts=prompts, default_prompt_name="query"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = [
            model(**tokenizer([(PROMPT + query, text)], return_tensors="pt")).logits.item()
            for query, text in PAIRS
        ]
    with Reranker(folder, backend="torch") as reranker:
        np.testing.assert_allclose(reranker.score(PAIRS, raw=True), theirs, atol=1e-4)
    bundle = convert(str(folder), [("gguf", "f16")], tmp_path / "bundle").folder
    assert Manifest.load(bundle).family.template[1] == PROMPT + "{query}"
    with Reranker(bundle) as reranker:
        np.testing.assert_allclose(reranker.score(PAIRS, raw=True), theirs, atol=2e-2)


@pytest.mark.parametrize(
    ("prompts", "name", "message"),
    [
        ({"query": "x"}, "document", "default_prompt_name = 'document', and prompts has: query"),
        ({}, "query", "and prompts has: none"),
        ({"query": "fill {query} in"}, "query", "has no place for"),
        ({"query": "[SEP] "}, "query", "special token"),
    ],
)
def test_a_prompt_that_cannot_be_put_there_is_refused(
    prompts: dict[str, str], name: str, message: str, folder: Path
) -> None:
    write(folder, MODEL, said(None, prompts=prompts, default_prompt_name=name))
    with pytest.raises(FamilyError, match=message):
        read_checkpoint(str(folder))


def module(name: str, path: str = "", package: str = "sentence_transformers.models") -> Any:
    return {**TRANSFORMER, "path": path, "type": f"{package}.{name}"}


UNHEADED = [TRANSFORMER, module("Pooling", "1_Pooling")]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (UNHEADED, "of the modules Transformer, Pooling"),
        ([], r"of the modules \(none\)"),
        ([module("Router")], "of the modules Router"),
        ([module("Transformer", package="custom_st")], "custom_st.Transformer': code of its own"),
        ([module("Transformer", "0_Transformer")], "has the model in '0_Transformer'"),
        ([TRANSFORMER, module("LogitScore", "../elsewhere")], "has LogitScore in '../elsewhere'"),
        ([{"type": "x"}], "expected objects with a type and a path"),
    ],
)
def test_other_modules_are_refused_by_name(modules: list[Any], message: str, folder: Path) -> None:
    write(folder, MODEL, said(None))
    write(folder, "modules.json", modules)
    # As with Ettin: the folder does not contain the whole model.
    tiny.edit_config(folder, architectures=["ModernBertModel"])
    with pytest.raises(FamilyError, match=rf"modules\.json .*{message}"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_lower_case": True}, None),  # BERT's tokenizer does so anyway
        ({"config_kwargs": {"num_labels": 3}}, "has config_kwargs"),
        ({"tokenizer_args": {"do_lower_case": True}}, "has tokenizer_args"),
        ({"config_args": {"trust_remote_code": True}}, None),
        ({"model_kwargs": {"torch_dtype": "bfloat16"}}, None),
        ({"processing_kwargs": {"text": {"padding": "max_length"}}}, None),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "add_special_tokens"),
        ({"transformer_task": "fill-mask"}, "transformer_task = 'fill-mask'"),
        ({"modality_config": {"message": {"method": "forward"}}}, "asks with a chat template"),
    ],
)
def test_how_text_is_read_is_read_or_refused(
    options: dict[str, Any], message: str | None, folder: Path
) -> None:
    write(folder, MODEL, said(None))
    write(folder, "sentence_bert_config.json", options)
    if message is None:
        assert read_checkpoint(str(folder)).family.name == "bert"
        return
    with pytest.raises(FamilyError, match=message):
        read_checkpoint(str(folder))


def test_lower_case_of_a_tokenizer_that_tells_cases_apart_is_refused(folder: Path) -> None:
    write(folder, MODEL, said(None))
    write(folder, "sentence_bert_config.json", {"do_lower_case": True})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_lower_case": False}))
    with pytest.raises(FamilyError, match="do_lower_case = true"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"max_seq_length": 99},
        {"processing_kwargs": {"text": {"max_length": 99}}},
        {"processing_kwargs": {"common": {"max_length": 99}}},
        {"processor_kwargs": {"model_max_length": 99}},
    ],
)
def test_the_limit_is_read_from_wherever_it_stands(options: dict[str, Any], folder: Path) -> None:
    write(folder, MODEL, said(None))
    write(folder, "sentence_bert_config.json", options)
    assert read_checkpoint(str(folder)).family.max_length == 99


# Causal models: see also test_decoders


@pytest.fixture
def described(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(checkpoint_of("qwen3"), tmp_path / "described"))
    return tiny_decoders.describe(folder)


def test_a_causal_model_asked_without_its_chat_template_is_refused(described: Path) -> None:
    write(described, "sentence_bert_config.json", {"modality_config": {"text": {}}})
    with pytest.raises(FamilyError, match="has no message in modality_config"):
        read_checkpoint(str(described))
    assert read_checkpoint(str(described), family="zerank").family.name == "zerank"


def test_messages_of_parts_make_the_same_prompt(described: Path) -> None:
    plain = read_checkpoint(str(described)).family
    message = {"message": {"method": "forward", "format": "structured"}}
    options = {"chat_template": {"add_generation_prompt": True, "restore_suffix": True}}
    content = {"modality_config": message, "processing_kwargs": options}
    write(described, "sentence_bert_config.json", content)
    plain_content, parts = "map(attribute='content')", "map(attribute='content.0.text')"
    template = tiny_decoders.CHAT.replace(plain_content, parts)
    (described / "chat_template.jinja").write_text(template, "utf-8")
    assert read_checkpoint(str(described)).family == plain


def test_an_activation_of_a_causal_model_is_read_too(described: Path) -> None:
    path = described / MODEL
    path.write_text(json.dumps({**json.loads(path.read_text()), "activation_fn": IDENTITY}))
    assert read_checkpoint(str(described)).family.activation == "identity"


def test_a_chat_template_that_fails_is_told(described: Path) -> None:
    (described / "chat_template.jinja").write_text("{{ raise_exception('no') }}", "utf-8")
    with pytest.raises(Exception, match="its chat template fails: no"):
        read_checkpoint(str(described))
