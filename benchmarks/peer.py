"""One reranker that users might pick, in its own process: run by `vs_peers.py` and `exported.py`.

    PYTHON peer.py SYSTEM MODEL WORK THREADS

It answers lines of `{"query": ..., "documents": [...]}` with `{"scores": [...], "seconds": ...}`.
The Python may be that of another environment, so only the functions that need qrank import it.
Every peer has the settings that its own documentation recommends for a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Score = Callable[[str, list[str]], Sequence[float]]
"""A query and its documents -> one score per document, in their order."""

NAME = "peers/model"
FLASHRANK = ("ms-marco-MiniLM-L-12-v2", "flashrank-MiniLM-L-12-v2_Q.onnx")
"""The model that FlashRank takes ours for: it knows only its own models' names and file names."""

TOKENS = 512
"""Maximum tokens of a pair; also llama.cpp's default for the tokens computed at once."""


def sentence_transformers(model: str, work: Path, threads: int, **settings: Any) -> Score:
    """CrossEncoder in torch, in fp32 whatever the checkpoint's data type; batches of 32."""
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(threads)
    if settings.get("backend", "torch") == "torch":
        settings.setdefault("model_kwargs", {"torch_dtype": torch.float32})
    tokens = int(os.environ.get("QRANK_PEER_TOKENS", TOKENS))
    encoder = CrossEncoder(
        model, device="cpu", local_files_only=True, max_length=tokens, **settings
    )

    def score(query: str, documents: list[str]) -> Sequence[float]:
        pairs = [(query, document) for document in documents]
        return [float(x) for x in encoder.predict(pairs, show_progress_bar=False)]

    return score


def sentence_transformers_bf16(model: str, work: Path, threads: int) -> Score:
    """CrossEncoder in torch, in bf16."""
    import torch

    return sentence_transformers(model, work, threads, model_kwargs={"torch_dtype": torch.bfloat16})


def sentence_transformers_openvino(model: str, work: Path, threads: int) -> Score:
    """CrossEncoder's OpenVINO backend, which its documentation recommends for CPUs."""
    return sentence_transformers(model, work, threads, backend="openvino")


def _exported(model: str, work: Path) -> Path:
    """A folder of the ONNX graphs that sentence-transformers writes: fp32, and int8 for VNNI."""
    folder = work / "onnx-peer"
    if not folder.exists():
        from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

        encoder = CrossEncoder(model, backend="onnx", device="cpu", local_files_only=True)
        encoder.save_pretrained(str(folder))
        export_dynamic_quantized_onnx_model(encoder, "avx512_vnni", str(folder))
    return folder


def sentence_transformers_onnx(model: str, work: Path, threads: int) -> Score:
    """CrossEncoder's ONNX backend."""
    folder = str(_exported(model, work))
    options = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider"}
    return sentence_transformers(folder, work, threads, backend="onnx", model_kwargs=options)


def sentence_transformers_onnx_int8(model: str, work: Path, threads: int) -> Score:
    """CrossEncoder's ONNX backend, quantized by its own function for AVX-512 VNNI."""
    folder = str(_exported(model, work))
    options = {
        "file_name": "onnx/model_qint8_avx512_vnni.onnx",
        "provider": "CPUExecutionProvider",
    }
    return sentence_transformers(folder, work, threads, backend="onnx", model_kwargs=options)


def fastembed(model: str, work: Path, threads: int) -> Score:
    """fastembed's custom cross-encoder: fp32, like most of its own models; batches of 64."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    folder = _exported(model, work)
    TextCrossEncoder.add_custom_model(
        model=NAME, model_file="onnx/model.onnx", sources=ModelSource(hf=NAME)
    )
    encoder = TextCrossEncoder(NAME, threads=threads, specific_model_path=str(folder))
    return lambda query, documents: [float(x) for x in encoder.rerank(query, documents)]


def flashrank(model: str, work: Path, threads: int) -> Score:
    """FlashRank: int8, like its own models of this kind; all documents in one batch."""
    from flashrank import Ranker, RerankRequest

    name, file = FLASHRANK
    exported, folder = _exported(model, work), work / "flashrank" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        for path in exported.glob("*.json"):
            shutil.copy(path, folder)
        shutil.copy(exported / "onnx" / "model_qint8_avx512_vnni.onnx", folder / file)
    ranker = Ranker(name, cache_dir=str(folder.parent), max_length=TOKENS, log_level="ERROR")

    def score(query: str, documents: list[str]) -> Sequence[float]:
        passages = [{"id": i, "text": text} for i, text in enumerate(documents)]
        found = ranker.rerank(RerankRequest(query=query, passages=passages))
        return [float(p["score"]) for p in sorted(found, key=lambda p: p["id"])]

    return score


def optimum_intel(model: str, work: Path, threads: int) -> Score:
    """optimum-intel's own model with int8 weights; sorted by length, batches of 32."""
    from optimum.intel import OVModelForSequenceClassification, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    runner = OVModelForSequenceClassification.from_pretrained(
        model,
        export=True,
        quantization_config=OVWeightQuantizationConfig(bits=8),
        ov_config={"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads},
        local_files_only=True,
    )

    def score(query: str, documents: list[str]) -> Sequence[float]:
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        scores = [0.0] * len(documents)
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            texts = [documents[i] for i in some]
            inputs = tokenizer(
                [query] * len(texts),
                texts,
                truncation=True,
                padding=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            for i, logit in zip(some, runner(**inputs).logits[:, 0].tolist(), strict=True):
                scores[i] = logit
        return scores

    return score


def llama_cpp(model: str, work: Path, threads: int) -> Score:
    """llama.cpp's RANK pooling, in batches of TOKENS tokens; all token types are 0.

    The file is qrank's `gguf-q8_0`, because llama.cpp's own converter is in no package; the ids are
    those of the bundle's tokenizer.
    """
    import numpy as np

    from qrank.backends import llama
    from qrank.bundle.manifest import TOKENIZER, Manifest
    from qrank.scoring.batching import cut_ragged, in_order
    from qrank.scoring.pair_tokenizer import PairTokenizer

    folder = Path(model)
    tokenizer = PairTokenizer(folder / TOKENIZER, Manifest.load(folder).family, max_length=TOKENS)
    library = llama.library()
    context = llama.new_context(
        llama.load(folder / "gguf-q8_0" / "model.gguf", "cpu"),
        TOKENS,
        64,
        n_ubatch=TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        embeddings=True,
        pooling_type=library.LLAMA_POOLING_TYPE_RANK,
    )

    def score(query: str, documents: list[str]) -> Sequence[float]:
        sequences = [tokenizer.whole(query, document)[0] for document in documents]
        lengths = np.array([len(ids) for ids in sequences])
        batches = cut_ragged(lengths, TOKENS, 64)
        found = []
        for batch in batches:
            ids = np.concatenate([sequences[i] for i in batch]).astype(np.int32)
            llama.run(library.llama_encode, context, ids, *llama.places(lengths[batch]))
            pointers = [library.llama_get_embeddings_seq(context, i) for i in range(len(batch))]
            found.append(np.array([pointer[0] for pointer in pointers], np.float32))
        return [float(x) for x in in_order(batches, found)]

    return score


def qrank(model: str, work: Path, threads: int, backend: str | None = None) -> Score:
    """What `qrank score` runs; without a backend, the target that `qrank tune` chose."""
    from qrank import Reranker

    reranker = Reranker(model, backend=backend, threads=threads)
    return lambda query, documents: [
        float(x) for x in reranker.score([(query, document) for document in documents])
    ]


def _graph(folder: str, pattern: str) -> str:
    """The only graph of an exported folder (`qrank export`)."""
    (path,) = Path(folder).glob(pattern)
    return path.relative_to(folder).as_posix()


def exported_onnx(model: str, work: Path, threads: int) -> Score:
    """CrossEncoder's ONNX backend on an exported folder."""
    file = _graph(model, "onnx/*.onnx")
    options = {"file_name": file, "provider": "CPUExecutionProvider"}
    return sentence_transformers(model, work, threads, backend="onnx", model_kwargs=options)


def exported_openvino(model: str, work: Path, threads: int) -> Score:
    """CrossEncoder's OpenVINO backend on an exported folder."""
    options = {"file_name": _graph(model, "openvino/*.xml")}
    return sentence_transformers(model, work, threads, backend="openvino", model_kwargs=options)


def exported_fastembed(model: str, work: Path, threads: int) -> Score:
    """fastembed's custom cross-encoder on an exported folder."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    TextCrossEncoder.add_custom_model(
        model=NAME, model_file=_graph(model, "onnx/*.onnx"), sources=ModelSource(hf=NAME)
    )
    encoder = TextCrossEncoder(NAME, threads=threads, specific_model_path=model)
    return lambda query, documents: [float(x) for x in encoder.rerank(query, documents)]


LOADERS: dict[str, Callable[[str, Path, int], Score]] = {
    "exported: sentence-transformers, ONNX": exported_onnx,
    "exported: sentence-transformers, OpenVINO": exported_openvino,
    "exported: fastembed": exported_fastembed,
}
"""Name in the table of `exported.py` -> function that opens an exported folder."""

PEERS: dict[str, Callable[[str, Path, int], Score]] = {
    "sentence-transformers, fp32": sentence_transformers,
    "sentence-transformers, bf16": sentence_transformers_bf16,
    "sentence-transformers, OpenVINO": sentence_transformers_openvino,
    "sentence-transformers, ONNX": sentence_transformers_onnx,
    "sentence-transformers, ONNX int8": sentence_transformers_onnx_int8,
    "fastembed": fastembed,
    "FlashRank, int8": flashrank,
    "optimum-intel, int8": optimum_intel,
    "llama.cpp RANK, q8_0": llama_cpp,
}
"""Name in the table -> function that opens it; all but the last take the checkpoint."""

OURS = "qrank"
"""The bundle's chosen target; with a variant after it (`qrank onnx-int8`), that variant."""


def main() -> None:
    """Open a system, and answer questions."""
    system, model, work, threads = sys.argv[1:]
    # Anything that a library prints to stdout would be read as an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if (peer := (PEERS | LOADERS).get(system)) is not None:
        score = peer(model, Path(work), int(threads))
    else:
        variant = system.removeprefix(OURS).strip()
        score = qrank(model, Path(work), int(threads), variant or None)
    for line in sys.stdin:
        question = json.loads(line)
        start = time.perf_counter()
        scores = score(question["query"], question["documents"])
        seconds = time.perf_counter() - start
        answers.write(json.dumps({"scores": list(scores), "seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
