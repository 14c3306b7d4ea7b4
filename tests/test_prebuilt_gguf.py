"""Prebuilt GGUF files: with any kind of head, they score like transformers or are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import prebuilt_files
import pytest
import test_conformance
import test_decoders
import tiny
import tiny_decoders

from qrank import Reranker
from qrank.backends import tolerance
from qrank.bundle.fidelity import Fidelity
from qrank.converters.convert import convert
from qrank.errors import ConversionError

Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def gguf_of(
    checkpoint_of: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a read-only GGUF file with its model's configuration and tokenizer next to it."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-gguf")
            family = tiny_decoders.FAMILIES.get(kind)
            source = str(checkpoint_of(kind))
            target = folder / "bundle"
            bundle = convert(source, [("gguf", "q8_0")], target, family=family).folder
            made[kind] = prebuilt_files.describe(checkpoint_of(kind), folder / "theirs") / "a.gguf"
            shutil.copy(bundle / "gguf-q8_0" / "model.gguf", made[kind])
        return made[kind]

    return get


def rewritten(path: Path, folder: Path, **changes: Any) -> Path:
    """Make a changed copy of a GGUF file in its own folder."""
    target = prebuilt_files.describe(path.parent, folder) / "changed.gguf"
    prebuilt_files.rewrite_gguf(path, target, **changes)
    return target


@pytest.mark.parametrize("head", ["yes, no", "no, yes", "token_embd.weight"])
def test_qwen3_in_gguf_with_a_head_in_either_order_or_none(
    head: str, gguf_of: Folders, checkpoint_of: Folders, tmp_path: Path
) -> None:
    path = gguf_of("qwen3")
    if head == "no, yes":
        rows = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "cls.output.weight")
        labels = {"qwen3.classifier.output_labels": ["no", "yes"]}
        tensors = {"cls.output.weight": rows[::-1]}
        path = rewritten(path, tmp_path / "turned", tensors=tensors, fields=labels)
    elif head == "token_embd.weight":
        left_out = {"cls.output.weight": None}
        # llama.cpp requires the rows that the file announces, so remove these fields too.
        fields = {"qwen3.classifier.output_labels": None, "qwen3.pooling_type": None}
        path = rewritten(path, tmp_path / "bare", tensors=left_out, fields=fields)
    made = convert(str(path), None, tmp_path / "out", family="qwen3-reranker")
    target, manifest = made.folder, made.manifest
    (variant,) = manifest.variants.values()
    assert variant.name == "gguf-q8_0"
    assert ("token_embd.weight, in Q8_0" if "," not in head else "cls.output") in variant.note
    theirs = test_decoders.reference("qwen3", checkpoint_of("qwen3"))
    with Reranker(target) as reranker:
        ours = reranker.score(test_decoders.PAIRS, raw=True)
    assert tolerance("gguf", "q8_0").shortfall(Fidelity.of(ours, theirs)) is None


def test_an_encoder_in_gguf(gguf_of: Folders, checkpoint_of: Folders, tmp_path: Path) -> None:
    made = convert(str(gguf_of("xlm-roberta")), None, tmp_path / "out")
    target, manifest = made.folder, made.manifest
    assert not manifest.probes.verified
    theirs, _ = test_conformance.reference(checkpoint_of("xlm-roberta"))
    with Reranker(target) as reranker:
        ours = reranker.score(test_conformance.PAIRS, raw=True)
    assert tolerance("gguf", "q8_0").shortfall(Fidelity.of(ours, theirs)) is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("xlm-roberta", {"tensors": {"cls.output.weight": None}}, "gives embeddings, not scores"),
        ("xlm-roberta", {"tensors": {"cls.weight": None}}, "lacks the head's first layer"),
        (
            "qwen3",
            {
                "tensors": {"cls.output.weight": None},
                "config": {"tie_word_embeddings": False},
            },
            r"neither a score head of the labels .* nor the output matrix \(output.weight\)",
        ),
        ("qwen3", {"config": {"vocab_size": 1300}}, "has 1,200 tokens; config.json says 1,?300"),
        (
            "qwen3",
            {"config": {"architectures": ["Qwen2ForCausalLM"]}},
            "architecture qwen3; Qwen2ForCausalLM is its qwen2",
        ),
    ],
)
def test_a_gguf_that_cannot_score_is_refused(
    kind: str, changes: dict[str, Any], message: str, gguf_of: Folders, tmp_path: Path
) -> None:
    path = rewritten(gguf_of(kind), tmp_path / "theirs", tensors=changes.get("tensors"))
    tiny.edit_config(path.parent, **changes.get("config", {}))
    with pytest.raises(ConversionError, match=message):
        convert(str(path), None, tmp_path / "out", family=tiny_decoders.FAMILIES.get(kind))
    assert not (tmp_path / "out").exists()


def test_a_gguf_of_one_token_type_is_no_bert(
    checkpoint_of: Folders, gguf_of: Folders, tmp_path: Path
) -> None:
    """llama.cpp's own converter gives every token type 0 in a BERT with two types."""
    folder = prebuilt_files.describe(checkpoint_of("bert"), tmp_path / "theirs")
    shutil.copy(gguf_of("xlm-roberta"), folder / "a.gguf")
    with pytest.raises(ConversionError, match=r"knows one token type.*family bert needs types 0"):
        convert(str(folder), None, tmp_path / "out")
