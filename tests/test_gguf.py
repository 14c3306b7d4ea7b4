"""GGUF: use of the files by other programs, and what llama.cpp must not do to the process."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from qrank import Reranker
from qrank.backends import Options, llama
from qrank.backends import gguf as backend
from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.bundle.sequences import Ids, Sequences
from qrank.cli import main
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.convert import convert
from qrank.errors import ConversionError, TargetError
from qrank.scoring.pair_tokenizer import PairTokenizer

PRECISIONS = [precision for format, precision in tiny.VARIANTS if format == "gguf"]
PAIRS = [(query, document[:200]) for query, document in probe_pairs()]
HEADS = {
    "bert": {"cls": "bert.pooler.dense", "cls.output": "classifier"},
    "bert-one-segment": {"cls": "bert.pooler.dense", "cls.output": "classifier"},
    "xlm-roberta": {"cls": "classifier.dense", "cls.output": "classifier.out_proj"},
    "modernbert-mean": {"cls": "head.dense", "cls.output": "classifier"},
    "modernbert-cls": {"cls": "head.dense", "cls.output": "classifier"},
}


def read(bundle: Path, precision: str) -> Any:
    return gguf.GGUFReader(bundle / f"gguf-{precision}" / "model.gguf")


def value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


# Use by other programs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_head_stays_f32(
    kind: str,
    precision: str,
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
) -> None:
    tensors = {tensor.name: tensor for tensor in read(bundle_of(kind), precision).tensors}
    weights = AutoModelForSequenceClassification.from_pretrained(checkpoint_of(kind)).state_dict()
    for ours, theirs in HEADS[kind].items():
        assert tensors[f"{ours}.weight"].tensor_type.name == "F32"
        expected = weights[f"{theirs}.weight"].numpy()
        # In GGUF, a matrix of one row is a vector.
        np.testing.assert_array_equal(tensors[f"{ours}.weight"].data.ravel(), expected.ravel())
    small = {"q4_k_m": "Q5_1", "q8_0": "Q8_0", "f16": "F16"}[precision]
    for name, tensor in tensors.items():
        if name.startswith(("blk.", "token_embd.")) and len(tensor.shape) == 2:
            words = precision == "q4_k_m" and name.startswith("token_embd.")
            assert tensor.tensor_type.name == ("Q8_0" if words else small), name


class Plain:
    """llama.cpp as other programs use it: with the file's vocabulary and its own rank pooling."""

    def __init__(self, path: Path) -> None:
        llama.library()  # silences llama.cpp's log
        self.model = llama_cpp.llama_model_load_from_file(
            os.fsencode(path), llama_cpp.llama_model_default_params()
        )
        assert self.model
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tiny.MAX_LENGTH
        settings.embeddings = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.context

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 1))()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, data, len(data), ids, len(ids), False, False
        )
        return ids[:count]

    def pair(self, query: str, document: str) -> list[int]:
        """Join a pair like llama-server (tools/server/server-common.cpp, format_prompt_rerank)."""
        eos = llama_cpp.llama_vocab_eos(self.vocabulary)
        ids = []
        if llama_cpp.llama_vocab_get_add_bos(self.vocabulary):
            ids.append(llama_cpp.llama_vocab_bos(self.vocabulary))
        ids += self.tokens(query)
        if llama_cpp.llama_vocab_get_add_eos(self.vocabulary):
            ids.append(eos)
        if llama_cpp.llama_vocab_get_add_sep(self.vocabulary):
            ids.append(llama_cpp.llama_vocab_sep(self.vocabulary))
        ids += self.tokens(document)
        if llama_cpp.llama_vocab_get_add_eos(self.vocabulary):
            ids.append(eos)
        return ids

    def rank(self, ids: list[int]) -> float:
        """The score by the file's pooling type, which must be rank."""
        assert llama_cpp.llama_pooling_type(self.context) == llama_cpp.LLAMA_POOLING_TYPE_RANK
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, number in enumerate(ids):
            batch.token[place], batch.pos[place] = number, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        assert llama_cpp.llama_encode(self.context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        return float(llama_cpp.llama_get_embeddings_seq(self.context, 0)[0])

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@pytest.fixture
def plain(kind: str, bundle_of: Callable[[str], Path]) -> Iterator[Plain]:
    if kind == "bert":
        pytest.skip("two token types: for qrank alone")
    opened = Plain(bundle_of(kind) / "gguf-f16" / "model.gguf")
    yield opened
    opened.close()


def test_plain_llama_cpp_gives_the_same_tokens_and_logits(
    kind: str, plain: Plain, bundle_of: Callable[[str], Path]
) -> None:
    bundle = bundle_of(kind)
    tokenizer = PairTokenizer(bundle / TOKENIZER, Manifest.load(bundle).family)

    def ours(query: str, document: str) -> Ids:
        prompt, (ids,) = tokenizer.prompt(query), tokenizer.documents([document])
        return tokenizer.pair(prompt, ids)[0]

    fitting = [pair for pair in PAIRS if len(ours(*pair)) <= tiny.MAX_LENGTH]
    assert len(fitting) > 20
    theirs = [plain.pair(*pair) for pair in fitting]
    assert theirs == [ours(*pair).tolist() for pair in fitting]
    with Reranker(bundle, backend="gguf-f16") as reranker:
        logits = reranker.score(fitting, raw=True)
    # Plain llama.cpp chooses its own attention implementation.
    np.testing.assert_allclose([plain.rank(ids) for ids in theirs], logits, atol=0.02)


def test_text_is_not_control_in_plain_llama_cpp(plain: Plain) -> None:
    special = {
        llama_cpp.llama_vocab_bos(plain.vocabulary),
        llama_cpp.llama_vocab_eos(plain.vocabulary),
    }
    for text in ("[CLS] a [SEP] b", "<s> a </s> b", "a [PAD] <pad> [MASK] <mask>"):
        assert not special & set(plain.tokens(text))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_says_who_may_run_it(
    kind: str, precision: str, bundle_of: Callable[[str], Path]
) -> None:
    reader = read(bundle_of(kind), precision)
    description = value(reader, "general.description")
    assert ("For qrank alone" in description) == (kind == "bert")
    assert ("llama-server" in description) == (kind != "bert")
    # Without a vocabulary, other programs cannot compute wrong scores.
    assert (value(reader, "tokenizer.ggml.model") == "none") == (kind == "bert")


# Substitutes for K-quants


def test_stand_ins_are_told(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    note = manifest.variants["gguf-q4_k_m"].note
    assert note == "rows of 64, 128 do not fit 256: 13 of 13 matrices are Q5_1, Q8_0"
    assert {v.note for v in manifest.variants.values() if v.name != "gguf-q4_k_m"} == {""}
    result = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert f"gguf-q4_k_m: {note}" in result.stdout


def test_gguf_is_made_in_q4_k_m_unless_told(
    bundle: Path, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    target = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    command = ["convert", str(checkpoint_of("bert")), "--to", "gguf", "-o", str(target)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "gguf-q4_k_m: rows of" in result.stdout


def test_where_token_types_are_flags_what_carries_them_stays_exact(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "flags"))
    weights = load_file(folder / "model.safetensors")
    types = weights["bert.embeddings.token_type_embeddings.weight"]
    types[1] = types[0]
    types[1, ::20] += 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    made = convert(str(folder), [("gguf", "q8_0"), ("gguf", "q4_k_m")], tmp_path / "out")
    for precision, count in (("q8_0", 5), ("q4_k_m", 4)):
        found = {t.name: t.tensor_type.name for t in read(made.folder, precision).tensors}
        exact = {name for name, kind in found.items() if kind == "F16"}
        words = {"token_embd.weight"} if precision == "q8_0" else set()
        carriers = {f"blk.{i}.attn_{x}.weight" for i in range(2) for x in "qk"}
        assert exact == carriers | words
        note = made.manifest.variants[f"gguf-{precision}"].note
        assert note.endswith(f"token types are flags: {count} of 13 matrices stay F16")


def test_where_rows_fit_nothing_stands_in(tmp_path: Path) -> None:
    """The hidden size, 256, fits K-quants; the intermediate size, 288, is not a multiple of 256."""
    folder = tiny.bert_one_segment(tmp_path / "wide")
    tiny.edit_config(folder, hidden_size=256, intermediate_size=288)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    made = convert(str(folder), [("gguf", "q4_k_m")], tmp_path / "out")
    target, manifest = made.folder, made.manifest
    assert manifest.variants["gguf-q4_k_m"].note == (
        "rows of 288 do not fit 256: 2 of 13 matrices are Q5_1"
    )
    found = {t.name: t.tensor_type.name for t in read(target, "q4_k_m").tensors}
    assert found["token_embd.weight"] == "Q6_K"
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["blk.1.ffn_down.weight"] == "Q5_1"
    assert found["cls.weight"] == found["cls.output.weight"] == "F32"


# Models that GGUF cannot represent


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("modernbert-mean", {"classifier_activation": "silu"}, "classifier_activation is 'silu'"),
    ],
    ids=["bert", "modernbert"],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    kind: str,
    change: dict[str, str],
    message: str,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    changed = Path(shutil.copytree(checkpoint_of(kind), tmp_path / "changed"))
    tiny.edit_config(changed, **change)
    with pytest.raises(ConversionError, match=message):
        convert(str(changed), [("gguf", "f16")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    """ModernBERT with biases, which transformers supports and llama.cpp does not."""
    folder = tiny.modernbert_cls(tmp_path / "biased")
    tiny.edit_config(folder, mlp_bias=True)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    with pytest.raises(ConversionError, match=r"no place for: model\.layers\.0\.mlp\.Wi\.bias"):
        convert(str(folder), [("gguf", "f16")], tmp_path / "out")


# The process


def test_llama_cpp_logs_to_python_alone(
    bundle: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "qrank.llama")
    with Reranker(bundle, backend="gguf") as reranker:
        reranker.score(PAIRS[:3])
    assert capfd.readouterr() == ("", "")
    lines = [record for record in caplog.records if record.name == "qrank.llama"]
    assert len(lines) > 10
    assert max(record.levelno for record in lines) < logging.WARNING


def test_an_absent_device_is_told_with_those_present(bundle: Path) -> None:
    assert "cpu" in backend.devices()
    absent = next(d for d in llama.DEVICES if d not in backend.devices())
    with pytest.raises(TargetError, match=f"no device '{absent}'; present are: cpu"):
        Reranker(bundle, backend="gguf-f16", device=absent)


def test_a_damaged_file_is_told_with_llama_cpps_reason(bundle: Path, tmp_path: Path) -> None:
    variant = Manifest.load(bundle).variants["gguf-f16"]
    folder = Path(shutil.copytree(bundle / variant.name, tmp_path / variant.name))
    content = (folder / "model.gguf").read_bytes()
    for damage in (b"", b"GGUF", content[: len(content) // 2]):
        (folder / "model.gguf").write_bytes(damage)
        with pytest.raises(TargetError, match=r"llama\.cpp cannot load .*: .*[a-z]{4}"):
            backend.open(tmp_path, variant, "cpu", Options(1))


def test_ids_beyond_the_vocabulary_are_an_error(bundle: Path) -> None:
    """llama.cpp would read beyond its embedding table or abort the process."""
    opened = backend.open(bundle, Manifest.load(bundle).variants["gguf-f16"], "cpu", Options(1))
    bad = np.array([2, 1_000_000, 3], np.int32)
    with pytest.raises(TargetError, match="invalid token"):
        opened.logits(Sequences([bad], [np.zeros(3, np.int8)]))
    opened.close()


@pytest.mark.parametrize(("chosen", "seen"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_sleep_unless_the_user_chose_otherwise(
    chosen: str | None, seen: str
) -> None:
    """OpenMP reads it when llama.cpp is loaded; the process's other children must not get it."""
    code = (
        "import os, qrank.backends.llama as llama; need, seen = llama.need, []\n"
        "def look(*given, **named):\n"
        "    seen.append(os.environ.get('OMP_WAIT_POLICY'))\n"
        "    return need(*given, **named)\n"
        "llama.need = look; llama.library(); print(seen[0], os.environ.get('OMP_WAIT_POLICY'))"
    )
    given = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    given |= {} if chosen is None else {"OMP_WAIT_POLICY": chosen}
    found = subprocess.check_output([sys.executable, "-c", code], text=True, env=given)
    assert found.split() == [seen, str(chosen)]
