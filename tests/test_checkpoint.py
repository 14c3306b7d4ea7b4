"""Everything in a checkpoint that affects its scores is read or refused; its code never runs."""

import ast
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_decoders
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import qrank.converters
from qrank import Reranker
from qrank.bundle.sequences import Sequences
from qrank.cli import main
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.checkpoint.reference import run_reference
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError, QrankError
from qrank.system import machine

PAIRS = [("which planet is red?", "Mars is red."), ("?", "bread"), ("red", "")]
MISSING = "(missing)"


@pytest.fixture
def copy_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Make a modifiable copy of a kind of checkpoint."""

    def copy(kind: str, name: str = "model") -> Path:
        return Path(shutil.copytree(checkpoint_of(kind), tmp_path / name))

    return copy


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; create it if missing."""
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}), "utf-8")


def logits(folder: Path, family: str | None = None) -> list[float]:
    with Reranker(folder, backend="torch", family=family, threads=1) as reranker:
        return [float(score) for score in reranker.score(PAIRS, raw=True)]


def transformers_logits(folder: Path) -> list[float]:
    """Logits from transformers' own tokenizer and model, used as in sentence-transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(**tokenizer([p], return_tensors="pt")).logits.item() for p in PAIRS]


# Adapters

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}


def adapter(folder: Path) -> None:
    edit(folder / "adapter_config.json", **ADAPTER)
    weights = {"base_model.model.bert.q.lora_A.weight": torch.ones(8, 64)}
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_an_adapter_beside_its_base_is_refused(kind: str, copy_of: Callable[..., Path]) -> None:
    folder = copy_of(kind)
    adapter(folder)
    message = r"adapter of owner/base \(adapter_config\.json, .*merge_and_unload"
    with pytest.raises(FamilyError, match=message):
        Reranker(folder, backend="torch", family="qwen3-reranker" if kind == "qwen3" else None)
    result = CliRunner().invoke(main, ["convert", str(folder), "-o", str(folder.parent / "b")])
    assert result.exit_code == FamilyError.exit_code
    assert "merge_and_unload" in result.stderr
    assert not (folder.parent / "b").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_an_adapter_alone_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}", "utf-8")
    with pytest.raises(FamilyError, match=rf"holds an adapter \({name}\)"):
        convert(str(tmp_path), [("onnx", "fp32")], tmp_path / "bundle")


def test_weights_of_an_adapter_among_the_models_are_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.0.attention.self.query.lora_A.default.weight"] = torch.ones(8, 64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"adapter that is not merged: .*lora_A"):
        logits(folder)


# Which weights


def test_files_that_transformers_does_not_read_change_nothing(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    before = read_checkpoint(str(folder))
    other = {name: x + 1 for name, x in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "model-00001-of-00002.safetensors")
    save_file(other, folder / "consolidated.safetensors")
    after = read_checkpoint(str(folder))
    assert (after.source, after.parameters()) == (before.source, before.parameters())


def test_weights_in_several_files_are_those_of_the_index(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    before = logits(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for place in range(2):
        name = f"part-{place}.safetensors"
        part = dict(list(weights.items())[place::2])
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    edit(folder / "model.safetensors.index.json", weight_map=index, metadata={})
    np.testing.assert_allclose(logits(folder), before, atol=1e-5)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"index\.json names part-1\.safetensors, which"):
        read_checkpoint(str(folder))


def test_a_decoders_original_is_upcast_beforehand_where_memory_suffices(
    copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("qwen3")
    weights = load_file(folder / "model.safetensors")
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", dtype="bfloat16")
    checkpoint = read_checkpoint(str(folder), family=tiny_decoders.FAMILIES["qwen3"])
    work = Sequences([np.arange(3, 40, dtype=np.int32), np.arange(9, 20, dtype=np.int32)])
    found = {}
    for free in (0, None, 1 << 40):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        model = checkpoint.load_to_run()
        found[model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype] = run_reference(
            model, work, checkpoint.family
        )
    assert [*found] == [torch.bfloat16, torch.float32]
    np.testing.assert_array_equal(found[torch.bfloat16], found[torch.float32])


def test_quantized_weights_are_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(FamilyError, match="has a quantization_config"):
        read_checkpoint(str(folder))


# Code in a checkpoint

EVIL = "from pathlib import Path; Path(__file__).with_name('ran').write_text('')\n"
CLASSES = {
    "AutoConfig": "evil.Config",
    "AutoModelForSequenceClassification": "evil.Model",
    "AutoTokenizer": ["evil.Slow", "evil.Fast"],
}


@pytest.fixture
def evil(copy_of: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """A checkpoint with its own code, which would leave a file behind if it ran."""
    folder = copy_of("bert")
    (folder / "evil.py").write_text(EVIL, "utf-8")
    edit(folder / "config.json", auto_map=CLASSES)
    edit(folder / "tokenizer_config.json", auto_map=CLASSES)
    yield folder
    assert not list(tmp_path.rglob("ran"))


def test_code_of_a_checkpoint_is_not_run_where_transformers_knows_better(
    evil: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No prompt asks, so "y" has no effect. llama.cpp's converter reads the config again."""
    target = str(tmp_path / "bundle")
    command = ["convert", str(evil), "--to", "gguf", "--precision", "f16", "-o", target]
    result = CliRunner().invoke(main, command, input="y\n" * 9)
    assert result.exit_code == 0, result.output
    assert "code of its own (auto_map). qrank does not run it" in caplog.text
    assert "[y/N]" not in result.output


@pytest.mark.parametrize("family", [None, "bert"])
@pytest.mark.parametrize("kind", ["evil", None])
def test_a_model_of_code_alone_is_refused(evil: Path, kind: str | None, family: str | None) -> None:
    edit(evil / "config.json", model_type=kind)
    message = rf"model_type = {kind!r}.*auto_map: .*evil\.Config.*runs no code of a checkpoint"
    with pytest.raises(FamilyError, match=message):
        Reranker(evil, backend="torch", family=family)


def test_every_reading_by_transformers_forbids_code() -> None:
    root = Path(qrank.converters.__path__[0])
    calls = [
        (path.name, call)
        for path in root.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) >= 3
    for name, call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given.get("trust_remote_code") == "False", (name, call.lineno)


# Tokenizers


def test_token_types_that_the_tokenizer_does_not_give_are_not_made_up(
    copy_of: Callable[..., Path],
) -> None:
    folder = copy_of("bert")
    edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    np.testing.assert_allclose(logits(folder), transformers_logits(folder), atol=1e-4)
    assert read_checkpoint(str(folder)).family.segments is None


def with_template(folder: Path, pair: str) -> None:
    """Give BERT's tokenizer another pair template, in a form that transformers keeps."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=names,
    )


def test_token_types_are_those_that_the_tokenizer_gives(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    with_template(folder, "[CLS] $A [SEP] $B [SEP]")
    np.testing.assert_allclose(logits(folder), transformers_logits(folder), atol=1e-4)
    other = copy_of("bert", "other")
    with_template(other, "[CLS] $A [SEP]:1 $B:1 [SEP]:1")
    with pytest.raises(FamilyError, match=r"token types \[0, 0, 1, 1, 1\]"):
        logits(other)


def test_a_text_is_cut_at_its_end_or_not_at_all(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    edit(folder / "tokenizer_config.json", truncation_side="left")
    with pytest.raises(FamilyError, match=r"tokenizer_config\.json has truncation_side = 'left'"):
        logits(folder)


def test_the_side_of_the_padding_changes_nothing(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    before = logits(folder)
    edit(folder / "tokenizer_config.json", padding_side="left")
    assert logits(folder) == before


@pytest.mark.parametrize("lower", [True, False])
def test_do_lower_case_is_the_tokenizer_configs(lower: bool, copy_of: Callable[..., Path]) -> None:
    """tokenizer.json lowercases text, but every version of transformers follows the config."""
    folder = copy_of("bert")
    edit(folder / "tokenizer_config.json", do_lower_case=lower)
    np.testing.assert_allclose(logits(folder), transformers_logits(folder), atol=1e-4)


def test_tokenizer_json_counts_where_transformers_makes_another_of_it(
    copy_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5 drops XLM-RoBERTa's normalizer; the model's author and other tools keep it."""
    folder = copy_of("xlm-roberta")
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(path)
    with caplog.at_level(logging.WARNING, "qrank"):
        read = read_checkpoint(str(folder)).tokenizer
    assert "qrank takes the file" in caplog.text
    written = Tokenizer.from_file(path)
    texts = ("ＦＵＬＬ ｗｉｄｔｈ ﬁne", "Mars")
    assert read(*texts)["input_ids"] == written.encode(*texts).ids
    assert AutoTokenizer.from_pretrained(folder)(*texts)["input_ids"] != written.encode(*texts).ids


# Each key that is read

CARD = """
name = "mine"
about = "a test's own"
architectures = ["DistilBertForSequenceClassification"]
template = ["{cls}", "{query}", "{sep}", "{document}", "{sep}"]
pooling = "cls"
activation = "sigmoid"
"""


def test_a_class_with_names_of_its_own_for_the_same_keys(copy_of: Callable[..., Path]) -> None:
    """DistilBERT calls them dim, n_heads, n_layers and hidden_dim."""
    folder = copy_of("bert")
    config = DistilBertConfig(
        vocab_size=1200, dim=64, n_heads=4, n_layers=2, hidden_dim=128, num_labels=1
    )
    torch.manual_seed(1)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    card = folder.parent / "mine.toml"
    card.write_text(CARD, "utf-8")
    np.testing.assert_allclose(logits(folder, str(card)), transformers_logits(folder), atol=1e-4)
    dimensions = read_checkpoint(str(folder), family=str(card)).dimensions
    assert (dimensions.hidden, dimensions.intermediate, dimensions.heads) == (64, 128, 4)


VALUES: tuple[Any, ...] = (MISSING, None, [], 7, "text")


def goes_through(folder: Path, file: str, *keys: str | int, family: str | None = None) -> None:
    """Each value gives a score or a one-line error; for a wrong type it names the file and key."""
    path = folder / file
    before = path.read_text("utf-8")
    place = json.loads(before)
    for key in keys[:-1]:
        place = place[key]
    kind = type(place.get(keys[-1]))
    for value in VALUES:
        content = json.loads(before)
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        if value == MISSING:
            place.pop(keys[-1])
        path.write_text(json.dumps(content), "utf-8")
        try:
            assert np.isfinite(logits(folder, family)).all()
        except QrankError as error:
            message = str(error)
            assert "\n" not in message
            # A value of the right type, or a default, may fail because of the weights or the card.
            if value not in (MISSING, None) and type(value) is not kind:
                plain = message.replace("_", " ")
                assert path.name in message, (value, message)
                assert str(keys[-1]).replace("_", " ") in plain, (value, message)
    path.write_text(before, "utf-8")


CONFIG = (
    *("architectures", "model_type", "auto_map", "id2label", "num_labels", "type_vocab_size"),
    *(
        "max_position_embeddings",
        "pad_token_id",
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
    ),
    *("num_hidden_layers", "intermediate_size", "sentence_transformers"),
    *("sbert_ce_default_activation_function", "quantization_config"),
)


def test_every_key_of_config_json(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    for key in CONFIG:
        goes_through(folder, "config.json", key, family="bert")
    goes_through(folder, "config.json", "architectures")
    edit(folder / "config.json", sentence_transformers={})
    goes_through(folder, "config.json", "sentence_transformers", "activation_fn")
    modern = copy_of("modernbert-mean", "modern")
    goes_through(modern, "config.json", "classifier_pooling")


DECODERS = (
    *("sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "head_dim"),
    *("rope_parameters", "num_key_value_heads", "tie_word_embeddings"),
)


def test_every_key_of_a_decoders_config_json(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("qwen3")
    for key in DECODERS:
        goes_through(folder, "config.json", key, family="qwen3-reranker")
    for key in ("rope_type", "original_max_position_embeddings"):
        scaled = {"rope_type": "longrope", "original_max_position_embeddings": 400}
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        edit(folder / "config.json", rope_parameters={"rope_theta": 1e4, **scaled, **factors})
        goes_through(folder, "config.json", "rope_parameters", key, family="qwen3-reranker")


TOKENIZER = (
    *("model_max_length", "truncation_side", "model_input_names", "do_lower_case"),
    *("tokenizer_class", "chat_template", "cls_token", "sep_token", "unk_token", "auto_map"),
)


def test_every_key_of_tokenizer_config_json(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    for key in TOKENIZER:
        goes_through(folder, "tokenizer_config.json", key)


METADATA = (
    ("modules.json", 0, "type"),
    ("modules.json", 1, "path"),
    ("config_sentence_transformers.json", "model_type"),
    ("config_sentence_transformers.json", "activation_fn"),
    ("config_sentence_transformers.json", "prompts"),
    ("config_sentence_transformers.json", "prompts", "query"),
    ("config_sentence_transformers.json", "default_prompt_name"),
    ("sentence_bert_config.json", "max_seq_length"),
    ("sentence_bert_config.json", "do_lower_case"),
    ("sentence_bert_config.json", "modality_config"),
    ("sentence_bert_config.json", "modality_config", "message"),
    ("sentence_bert_config.json", "processing_kwargs"),
    ("sentence_bert_config.json", "processing_kwargs", "chat_template"),
    ("sentence_bert_config.json", "config_kwargs"),
    ("sentence_bert_config.json", "processor_kwargs"),
    ("sentence_bert_config.json", "model_kwargs"),
    ("sentence_bert_config.json", "tokenizer_name_or_path"),
    ("1_LogitScore/config.json", "true_token_id"),
    ("1_LogitScore/config.json", "false_token_id"),
    ("1_LogitScore/config.json", "module_input_name"),
)


def test_every_key_of_sentence_transformers_files(copy_of: Callable[..., Path]) -> None:
    folder = tiny_decoders.describe(copy_of("qwen3"))
    for file, *keys in METADATA:
        goes_through(folder, str(file), *keys)


@pytest.mark.parametrize("key", ["weight_map", "metadata"])
def test_every_key_of_the_weights_index(key: str, copy_of: Callable[..., Path]) -> None:
    folder = copy_of("bert")
    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(folder / "all.safetensors")
    places = dict.fromkeys(names, "all.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=places, metadata={})
    goes_through(folder, "model.safetensors.index.json", key)


FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_LogitScore/config.json", "added_tokens.json"),
)


@pytest.mark.parametrize("content", ["{", "null", "7", "[[[]]]", '"text"', "[" * 100_000])
def test_files_that_are_no_json_of_their_kind(content: str, copy_of: Callable[..., Path]) -> None:
    folder = tiny_decoders.describe(copy_of("qwen3"))
    for name in FILES:
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).write_text(content, "utf-8")
        with pytest.raises(QrankError) as caught:
            logits(folder)
        message = str(caught.value)
        assert "\n" not in message
        assert Path(name).name in message or "its tokenizer" in message, (name, message)
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
