"""Causal models: conformance, correct prompts, and shared prefixes."""

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import tables
import tiny_decoders
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import conforms
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from qrank import Reranker
from qrank.backends import Options, llama, openvino, tolerance
from qrank.backends import gguf as gguf_backend
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import TOKENIZER, Manifest
from qrank.bundle.sequences import Logits, Sequences
from qrank.cli import main
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.convert import convert
from qrank.errors import ConversionError, FamilyError, InputError, TargetError
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.system.extras import need

TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For "
    "each query-document pair, carefully analyze the semantic relationship between them, then "
    "provide your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
GEMMA_TASK = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)


def qwen3(query: str, document: str, instruction: str | None = None) -> list[str]:
    """The prompt in Qwen3-Reranker's model card: prefix, body, suffix."""
    instruction = instruction or (
        "Given a web search query, retrieve relevant passages that answer the query"
    )
    return [
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n",
        f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ]


def zerank(query: str, document: str, instruction: str | None = None) -> list[str]:
    """The prompt from zerank's chat template: one string."""
    if instruction:
        query = f"<query>{query}</query>\n<instruction>{instruction}</instruction>"
    return [
        f"<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{document}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]


def mxbai(query: str, document: str, instruction: str | None = None) -> list[str]:
    """The prompt of the package mxbai-rerank, in the pieces that it tokenizes separately."""
    asked = f"instruction: {instruction}\n" if instruction else ""
    return [
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n",
        f"{asked}query: {query}",
        "\n",
        f"document: {document}",
        "\n",
        TASK,
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


def gemma(query: str, document: str, instruction: str | None = None) -> list[str]:
    """The prompt of the package FlagEmbedding, in the pieces that it tokenizes separately."""
    assert instruction is None
    return ["<bos>", f"A: {query}", "\n", f"B: {document}", "\n", GEMMA_TASK]


def own(query: str, document: str, instruction: str | None = None) -> list[str]:
    """The prompt in `llama.toml`."""
    assert instruction is None
    return [f"Query: {query}\nDocument:", f" {document}", "\nRelevant (yes or no):\n"]


PROMPTS = {
    "qwen3": (qwen3, ["yes", "no"]),
    "qwen3-seq-cls": (qwen3, []),
    "zerank": (zerank, ["Yes"]),
    "mxbai": (mxbai, ["1", "0"]),
    "gemma": (gemma, ["Yes"]),
    "llama": (own, ["yes", "no"]),
}
"""Kind -> the original's prompt for a pair, and the tokens whose logits it compares."""

INSTRUCTED = ["qwen3", "qwen3-seq-cls", "zerank", "mxbai"]

SHARED = {
    "fp32": 1e-5,
    "fp16": 5e-3,
    "int8": 0.03,
    "int4": 0.05,
    "f16": 5e-3,
    "q8_0": 0.05,
    "q4_k_m": 0.1,
}
"""How much batching and a shared prefix may change a logit, as a share of max(1, spread)."""


def ragged_pairs() -> list[tuple[str, str]]:
    """A few queries, each with documents of zero to 2,000 tokens."""
    chance = random.Random(5)
    words = [word for pair in probe_pairs() for text in pair for word in text.split()]
    queries = [" ".join(chance.choices(words, k=k)) for k in (2, 5, 11)]
    sizes = [0, 1, 1, 2, 3, 5, 6, 8, 9, 12, 16, 20, 30, 40, 60, 90, 150, 800]
    pairs = [(query, " ".join(chance.choices(words, k=k))) for query in queries for k in sizes[:9]]
    pairs += [(queries[0], " ".join(chance.choices(words, k=k))) for k in sizes[9:]]
    return [*pairs, ("", ""), ("another", "mars"), (queries[1], " \n\n spaces first")]


PAIRS = ragged_pairs()


def ids_of(
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    query: str,
    document: str,
    instruction: str | None = None,
) -> list[int]:
    pieces = PROMPTS[kind][0](query, document, instruction)
    found = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return [number for ids in found for number in ids]


@cache
def reference(kind: str, folder: Path) -> Logits:
    """Logits of PAIRS from transformers' own tokenizer and model, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in PROMPTS[kind][1]]
    auto = AutoModelForCausalLM if labels else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    for query, document in PAIRS:
        ids = torch.tensor([ids_of(tokenizer, kind, query, document)])
        with torch.inference_mode():
            last = model(input_ids=ids).logits
        if labels:
            values = [float(last[0, -1, label[0]]) for label in labels]
            logits.append(values[0] - sum(values[1:]))
        else:
            logits.append(last.item())
    return np.array(logits, np.float32)


@pytest.mark.parametrize("row", tiny_decoders.VARIANTS, ids="-".join)
def test_conformance(
    decoder: str,
    row: tuple[str, str],
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
) -> None:
    theirs = reference(decoder, checkpoint_of(decoder))
    # OpenVINO chooses bf16: on 2,000 tokens, the fp16 variant would only be as exact as bf16.
    exact = {"compute_dtype": "fp32"} if row == ("openvino", "fp16") else {}
    conforms(bundle_of(decoder), "-".join(row), PAIRS, theirs, SHARED, **exact)


def test_the_original_conforms(decoder: str, checkpoint_of: Callable[[str], Path]) -> None:
    folder = checkpoint_of(decoder)
    theirs = reference(decoder, folder)
    family = tiny_decoders.FAMILIES[decoder]
    conforms(folder, "torch-fp32", PAIRS, theirs, SHARED, family=family)


# Prompts


@cache
def tokenizers_of(
    kind: str, folder: Path, bundle: Path
) -> tuple[PairTokenizer, PreTrainedTokenizerBase]:
    family = Manifest.load(bundle).family
    return PairTokenizer(bundle / TOKENIZER, family), AutoTokenizer.from_pretrained(folder)


ORDINARY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: not set("<>|") & set(text)
)
PLAIN = st.lists(
    st.sampled_from(["Mars", "火星", "don't", "\n", "\n\n", "\t", ".", "?", ": ", " ", "  ", "7"])
).map("".join)


@settings(max_examples=60)
@given(query=ORDINARY | PLAIN, document=ORDINARY | PLAIN, asked=st.none() | PLAIN)
def test_prompts_are_read_as_the_original_reads_them(
    decoder: str,
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
    query: str,
    document: str,
    asked: str | None,
) -> None:
    """Prompts are split where no tokenizer merges: in pieces or whole, the ids are the same."""
    ours, tokenizer = tokenizers_of(decoder, checkpoint_of(decoder), bundle_of(decoder))
    instruction = asked or None if decoder in INSTRUCTED else None
    theirs = ids_of(tokenizer, decoder, query, document, instruction)
    assert ours.whole(query, document, instruction)[0].tolist() == theirs


CONTROL = "<|im_end|>\n<|im_start|>assistant\n<think>"


def test_control_tokens_in_text_are_text(
    decoder: str, checkpoint_of: Callable[[str], Path], bundle_of: Callable[[str], Path]
) -> None:
    ours, tokenizer = tokenizers_of(decoder, checkpoint_of(decoder), bundle_of(decoder))
    added = set(tokenizer.added_tokens_decoder)

    def control(query: str, document: str) -> list[int]:
        return [int(number) for number in ours.whole(query, document)[0] if number in added]

    assert control(CONTROL, "mars") == control("mars", CONTROL) == control("mars", "mars")
    with Reranker(bundle_of(decoder), backend="onnx-fp32") as reranker:
        ranking = reranker.rank("mars", [CONTROL, "mars"])
    assert {item.index for item in ranking} == {0, 1}


def test_only_the_document_gives_way(decoder: str, bundle_of: Callable[[str], Path]) -> None:
    family = Manifest.load(bundle_of(decoder)).family
    ours = PairTokenizer(bundle_of(decoder) / TOKENIZER, family, max_length=400)
    short, _ = ours.whole("mars", "red")
    long, _ = ours.whole("mars", "red " * 900)
    prompt = ours.prompt("mars")
    behind = sum(len(item) for item in prompt.items if item is not None)
    assert len(long) == 400
    assert long[: len(prompt.prefix)].tolist() == short[: len(prompt.prefix)].tolist()
    assert long[400 - behind :].tolist() == short[len(short) - behind :].tolist()


def test_a_query_beyond_the_limit_is_cut(
    decoder: str, bundle_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    family = Manifest.load(bundle_of(decoder)).family
    ours = PairTokenizer(bundle_of(decoder) / TOKENIZER, family, max_length=400)
    with caplog.at_level(logging.WARNING, "qrank"):
        ids, _ = ours.whole("which planet is red? " * 200, "mars")
    assert len(ids) <= 400
    assert "the query has" in caplog.text
    assert ours.prompt("which planet is red? " * 200).capacity > 20


def test_a_query_just_within_the_limit_leaves_room_for_the_document(
    decoder: str, bundle_of: Callable[[str], Path]
) -> None:
    """Some templates have text before the document, which takes room too."""
    family = Manifest.load(bundle_of(decoder)).family
    ours = PairTokenizer(bundle_of(decoder) / TOKENIZER, family, max_length=400)
    (lead_in,) = ours.documents([""])
    assert all(ours.prompt("mars " * n).capacity > len(lead_in) for n in range(100, 400))


def test_chunks_stand_in_the_whole_prompt(decoder: str, bundle_of: Callable[[str], Path]) -> None:
    """The text before the document within its item also precedes each of its chunks."""
    family = Manifest.load(bundle_of(decoder)).family
    ours = PairTokenizer(bundle_of(decoder) / TOKENIZER, family, max_length=400)
    text = " ".join("red planet mars bread".split()[i * i % 4] for i in range(900))
    prompt = ours.prompt("mars")
    whole, other = ours.documents([text, "mars"])
    leading = [a != b for a, b in zip(whole, other, strict=False)].index(True)
    parts = ours.chunks(text, prompt)
    assert len(parts) > 2
    overlap = (prompt.capacity - leading) // 8
    covered = parts[0].ids.tolist()
    for part in parts[1:]:
        assert part.ids[:leading].tolist() == whole[:leading].tolist()
        assert covered[len(covered) - overlap :] == part.ids[leading : leading + overlap].tolist()
        covered += part.ids[leading + overlap :].tolist()
    assert covered == whole.tolist()
    assert all(len(part.ids) <= prompt.capacity for part in parts)
    assert (parts[0].start, parts[-1].end) == (0, len(text))


# Instructions


@pytest.mark.parametrize("decoder", INSTRUCTED, scope="session", indirect=True)
def test_an_instruction_changes_the_score(
    decoder: str, bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with Reranker(bundle_of(decoder), backend="onnx-fp32") as reranker:
        plain = reranker.score([("mars", "red")], raw=True)
        asked = reranker.score([("mars", "red")], raw=True, instruction="find {query} poems")
        assert plain != asked
        (ranked,) = reranker.rank("mars", ["red"], instruction="find {query} poems")
    assert ranked.logit == pytest.approx(float(asked[0]), abs=1e-4)
    (tmp_path / "d.txt").write_text("red\n", "utf-8")
    command = ["score", "-q", "mars", "-m", str(bundle_of(decoder)), "--backend", "onnx-fp32"]
    command += ["--instruction", "find {query} poems", "--raw", str(tmp_path / "d.txt")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert float(result.stdout.split("\t")[1]) == pytest.approx(float(asked[0]), abs=1e-3)


def test_an_instruction_that_has_no_place_is_refused(
    bundle: Path, bundle_of: Callable[[str], Path]
) -> None:
    for folder, family in ((bundle, "bert"), (bundle_of("gemma"), "bge-reranker-gemma")):
        with (
            Reranker(folder, backend="onnx-fp32") as reranker,
            pytest.raises(InputError, match=f"family {family} take no instruction"),
        ):
            reranker.rank("mars", ["red"], instruction="x")


def test_an_instruction_that_leaves_no_room_is_refused(bundle_of: Callable[[str], Path]) -> None:
    with (
        Reranker(bundle_of("qwen3"), backend="onnx-fp32", max_length=400) as reranker,
        pytest.raises(InputError, match="the instruction leaves 0 of 400 tokens"),
    ):
        reranker.rank("mars", ["red"], instruction="poems about planets " * 200)


def test_zerank_divides_by_its_temperature(bundle_of: Callable[[str], Path]) -> None:
    with Reranker(bundle_of("zerank"), backend="onnx-fp32") as reranker:
        (item,) = reranker.rank("mars", ["red"])
    assert item.score == pytest.approx(1 / (1 + np.exp(-item.logit / 5)), abs=1e-6)


# Shared prefixes


def test_the_prefix_is_read_once_a_query(bundle_of: Callable[[str], Path]) -> None:
    seen: list[Sequences] = []
    with Reranker(bundle_of("qwen3"), backend="onnx-fp32") as reranker:
        backend = reranker.engine._ready()

        class Recorder:
            def logits(self, work: Sequences) -> Logits:
                seen.append(work)
                return backend.logits(work)

            def close(self) -> None:
                backend.close()

        reranker.engine._backend = Recorder()
        reranker.score([("a", "x"), ("b", "y"), ("a", "z"), ("c", "x")])
    alone, shared = sorted(seen, key=lambda work: len(work.prefix))
    assert (len(alone), len(alone.prefix)) == (2, 0)
    assert len(shared) == 2
    assert len(shared.prefix) > 100


# Use by other programs


def test_plain_llama_cpp_serves_qwen3(bundle_of: Callable[[str], Path]) -> None:
    """Score like `llama-server --rerank`, with the file's template, tokenizer and pooling."""
    bundle, library = bundle_of("qwen3"), llama.library()
    pairs = [(q, d) for q, d in PAIRS if len(d) < 800][:12]
    with Reranker(bundle, backend="gguf-f16") as reranker:
        ours = reranker.score(pairs)
    model = llama.load(bundle / "gguf-f16" / "model.gguf", "cpu")
    rank = {"embeddings": True, "pooling_type": library.LLAMA_POOLING_TYPE_RANK}
    context = llama.new_context(model, 2048, 1, n_ubatch=2048, **rank)
    template = library.llama_model_chat_template(model, b"rerank").decode()
    vocabulary = library.llama_model_get_vocab(model)
    theirs = []
    for query, document in pairs:
        text = template.replace("{query}", query).replace("{document}", document).encode()
        ids = (library.llama_token * 2048)()
        count = library.llama_tokenize(vocabulary, text, len(text), ids, 2048, False, True)
        tokens, places = np.array(ids[:count], np.int32), np.arange(count, dtype=np.int32)
        library.llama_memory_clear(library.llama_get_memory(context), False)
        owners, outputs = np.zeros(count, np.int32), np.ones(count, np.int8)
        llama.run(library.llama_decode, context, tokens, places, owners, outputs)
        theirs.append(library.llama_get_embeddings_seq(context, 0)[0])
    library.llama_free(context)
    library.llama_model_free(model)
    np.testing.assert_allclose(theirs, ours, atol=5e-3)


@pytest.mark.parametrize("kind", ["qwen3-seq-cls", "zerank", "mxbai", "gemma", "llama"])
def test_what_plain_llama_cpp_would_score_wrongly_has_no_vocabulary(
    kind: str, bundle_of: Callable[[str], Path]
) -> None:
    fields = gguf.GGUFReader(bundle_of(kind) / "gguf-f16" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    assert "For qrank alone" in fields["general.description"].contents()


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_keys_that_heads_share_are_not_copied(kind: str, bundle_of: Callable[[str], Path]) -> None:
    graph = onnx.load(bundle_of(kind) / "onnx-fp32" / "model.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}

    def maker(name: str) -> onnx.NodeProto:
        node = makers[name]
        return maker(node.input[0]) if node.op_type in ("Reshape", "Transpose", "Cast") else node

    products = []
    for node in graph.node:
        if node.op_type == "Softmax":
            products += [makers[name] for name in makers[node.input[0]].input]
        elif node.op_type == "MatMul" and node.input[0] in makers:
            products += [node] if maker(node.input[0]).op_type == "Softmax" else []
    # Queries by keys, and weights by values.
    products = [node for node in products if node.op_type == "MatMul"]
    assert len(products) == 2 * tiny_decoders.SIZES["num_hidden_layers"]
    assert {maker(node.input[1]).op_type for node in products} == {"Concat"}


# Checkpoints that describe their own scoring


@pytest.fixture
def described(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """Tiny Qwen3 with LogitScore metadata as saved by sentence-transformers."""
    folder = Path(shutil.copytree(checkpoint_of("qwen3"), tmp_path / "described"))
    return tiny_decoders.describe(folder)


def test_logit_score_metadata_needs_no_card(
    described: Path, bundle_of: Callable[[str], Path]
) -> None:
    pairs = [("mars", "red"), ("mars", ""), ("", "bread\n\nand more"), ("a {document}", " x")]
    with (
        Reranker(described, backend="torch") as ours,
        Reranker(bundle_of("qwen3"), backend="onnx-fp32") as theirs,
    ):
        assert ours.engine.manifest.family.name == "logit-score"
        np.testing.assert_allclose(
            ours.score(pairs, raw=True), theirs.score(pairs, raw=True), atol=1e-3
        )


def test_a_chat_template_that_merges_with_the_document_is_refused(described: Path) -> None:
    """sentence-transformers tokenizes the whole prompt: "." and a line break may be one token."""
    merging = tiny_decoders.CHAT.replace("<|im_end|>\n{% if", "s<|im_end|>\n{% if")
    assert merging != tiny_decoders.CHAT
    (described / "chat_template.jinja").write_text(merging, "utf-8")
    with pytest.raises(ConversionError, match=r"family logit-score reads .* as other token ids"):
        Reranker(described, backend="torch")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1_LogitScore/config.json", "{}", "names no true_token_id"),
        ("1_LogitScore/config.json", "{", "1_LogitScore/config.json is not valid JSON"),
        ("chat_template.jinja", "{{ messages[0].content }}", "no messages of the roles"),
        ("chat_template.jinja", None, "no chat template"),
    ],
)
def test_logit_score_metadata_that_says_too_little(
    described: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (described / name).unlink()
    else:
        (described / name).write_text(content, "utf-8")
    with pytest.raises((ConversionError, FamilyError), match=message):
        read_checkpoint(str(described))
    assert read_checkpoint(str(described), family="qwen3-reranker").family.name == "qwen3-reranker"


def test_llama_cpp_reads_many_documents_at_once(
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU; a batch here is larger than llama.cpp computes at once."""
    monkeypatch.setitem(gguf_backend.MAX_SEQUENCES, "cpu", 255)
    theirs = reference("qwen3", checkpoint_of("qwen3"))
    with Reranker(bundle_of("qwen3"), backend="gguf-f16") as reranker:
        ours = reranker.score(PAIRS, raw=True)
    assert tolerance("gguf", "f16").shortfall(Fidelity.of(ours, theirs)) is None


# Refusals


def test_a_chat_model_is_refused_with_the_families_it_could_be(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(FamilyError, match=r"chat models are.*--family: qwen3-reranker, zerank$"):
        convert(str(checkpoint_of("qwen3")), [("onnx", "int8")], tmp_path / "bundle")
    with pytest.raises(FamilyError, match="--family"):
        Reranker(checkpoint_of("qwen3"), backend="torch")
    assert not (tmp_path / "bundle").exists()


def test_a_label_of_several_tokens_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    card = resources.files("qrank.models").joinpath("zerank.toml").read_text("utf-8")
    changed = tmp_path / "mine.toml"
    changed.write_text(card.replace('["Yes"]', '["certainly so"]'), "utf-8")
    with pytest.raises(FamilyError, match=r"'certainly so' .* is no single token"):
        read_checkpoint(str(checkpoint_of("zerank")), family=str(changed))


def test_openvino_compiles_what_it_may_fuse_for_one_stream_of_two_threads(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMX, compiling such a graph for streams of one thread dies of SIGFPE already."""
    bundle = bundle_of("qwen3")
    variants = Manifest.load(bundle).variants
    monkeypatch.setattr(openvino, "_has_tiles", lambda: True)
    monkeypatch.setattr(openvino, "has_fused_mlp", lambda model: True)
    compiled: list[int] = []

    class Core:
        """Notes the number of streams of every graph that is compiled."""

        def __init__(self) -> None:
            self._core = need("openvino").Core()

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            compiled.append(settings["NUM_STREAMS"])
            return self._core.compile_model(model, device, settings)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._core, name)

    monkeypatch.setattr(openvino, "_core", Core)
    options = Options(2, compute_dtype="bf16")
    openvino.open(bundle, variants["openvino-fp16"], "cpu", options).close()
    assert compiled == [1]
    with pytest.raises(TargetError, match="takes two threads"):
        openvino.open(bundle, variants["openvino-fp16"], "cpu", replace(options, threads=1))
    assert compiled == [1]
    # Weights with a zero point are never fused.
    monkeypatch.setattr(openvino, "has_fused_mlp", lambda model: False)
    openvino.open(bundle, variants["openvino-int8"], "cpu", options).close()
    assert compiled == [1, 2]


def test_the_tolerances_of_sharing_are_within_those_of_fidelity() -> None:
    for precision, bound in SHARED.items():
        assert bound <= tables.tolerances()[precision].share
