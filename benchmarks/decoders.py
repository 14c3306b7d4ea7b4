"""Decoder rerankers at the size of Qwen3-Reranker-0.6B, compared with their alternatives.

The weights are random; a prompt of 64 tokens precedes documents of several lengths. qrank's targets
run with and without a shared prefix. The others read every pair whole: sentence-transformers'
CrossEncoder in torch, in bf16 if the CPU computes in it and else in fp32, a causal model of
optimum-intel in int8 (full logits) if that is installed, and llama.cpp's embeddings, which is how
it reranks. All take turns. Then each variant of qrank's is started cold.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, report, tolerate_anything
from real_size import SHAPES, convert, make, tiny_decoders

from qrank import Reranker
from qrank.backends import Options, llama, spec
from qrank.backends.torch import as_bundle
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Sequences
from qrank.system.machine import instruction_sets, peak_memory, processors

SHAPE = "Qwen3-Reranker-0.6B"
PREFIX = 64
VARIANTS = ("openvino-int8", "openvino-int4", "onnx-int8", "gguf-q4_k_m", "gguf-q8_0")
UBATCH = 512
"""llama.cpp's own default for the number of tokens computed at once."""

Run = Callable[[], object]
LOAD = {
    "target": "",
    "first start s": ".1f",
    "later starts s": ".1f",
    "peak MB": ",.0f",
    "on disk MB": ",.0f",
}
"""Times are to the first score. The very first start checks the files' hashes and the probes."""


def main() -> None:
    """Make and convert the model, and time every target at every length."""
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="folder to keep checkpoint and bundle in")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument(
        "--ready",
        type=Path,
        help="bundle of optimum-intel's int8 export, as qrank convert takes it",
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 64, 128, 512])
    parser.add_argument("--documents", type=int, default=20, help="a round; fewer of long ones")
    parser.add_argument(
        "--batches", nargs="+", type=int, help="tokens of a batch  [default: the backend's own]"
    )
    parser.add_argument("--fp32", action="store_true", help="compute in fp32 too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("BUNDLE", "VARIANT"), help="(internal)")
    options = parser.parse_args()
    tolerate_anything()
    if options.child:
        sys.stdout.write(json.dumps(_first_score(*options.child)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        checkpoint, bundle = work / SHAPE, work / "bundle"
        if not checkpoint.exists():
            make(SHAPE, checkpoint)
        made = Manifest.load(bundle).variants if bundle.exists() else {}
        for variant in options.variants:
            if variant not in made:
                convert(checkpoint, bundle, variant)
        torch.set_num_threads(processors())
        rows: dict[str, dict[str, object]] = {}
        targets = _ours(bundle, options.variants, options) | _in_torch(checkpoint)
        targets |= _theirs(checkpoint, bundle)
        if options.ready:
            targets |= _ours(options.ready, ["openvino-int8"], options, "optimum-intel's graph, ")
        for length in options.lengths:
            count = max(2, min(options.documents, options.documents * 128 // length))
            cases = {name: prepare(length, count) for name, prepare in targets.items()}
            for name, seconds in alternate(cases, options.rounds).items():
                row = rows.setdefault(name, {"target": name})
                row[f"{PREFIX} + {length}"] = count / statistics.median(seconds)
        columns = {"target": "", **{f"{PREFIX} + {length}": ".1f" for length in options.lengths}}
        title = f"{SHAPE}'s size, pairs/s by tokens of prompt + document"
        report(title, columns, list(rows.values()), as_json=options.json)
        loads = [_load(bundle, variant) for variant in options.variants]
        report(f"{SHAPE}'s size, cold start", LOAD, loads, as_json=options.json)


def _pairs(length: int, count: int) -> Sequences:
    """Documents of random ordinary tokens after one prefix."""
    chance = np.random.default_rng(length)
    ids = chance.integers(300, 1000, PREFIX + count * length).astype(np.int32)
    return Sequences(list(ids[PREFIX:].reshape(count, length)), prefix=ids[:PREFIX])


def _ours(
    bundle: Path, variants: list[str], options: Any, label: str = ""
) -> dict[str, Callable[[int, int], Run]]:
    manifest = Manifest.load(bundle)
    prepared: dict[str, Callable[[int, int], Run]] = {}
    for name in variants:
        variant = manifest.variants[name]
        choices = spec(variant.format).compute_dtypes("cpu") or (None,)
        for dtype in choices if options.fp32 else choices[:1]:
            for batch in options.batches or [None]:
                settings = Options(processors(), dtype, batch)
                backend = spec(variant.format).open(bundle, variant, "cpu", settings)
                row = label + (f"{name} ({dtype})" if dtype else name)
                row += f", {batch} a batch" if batch else ""
                prepared |= _both(row, backend.logits)
    return prepared


def _both(row: str, logits: Callable[[Sequences], object]) -> dict[str, Callable[[int, int], Run]]:
    """Scoring with and without a shared prefix."""
    return {
        f"{row}, shared": lambda length, count: partial(logits, _pairs(length, count)),
        f"{row}, unshared": lambda length, count: partial(logits, _pairs(length, count).whole()),
    }


def _in_torch(checkpoint: Path) -> dict[str, Callable[[int, int], Run]]:
    """qrank's own scoring of the checkpoint."""
    dtype = "bf16" if _has_bf16() else "fp32"
    family = tiny_decoders.FAMILIES.get(SHAPES[SHAPE][0])
    bundle, _ = as_bundle(str(checkpoint), family)
    manifest = bundle.manifest
    settings = Options(processors(), family=manifest.family)
    variant = manifest.variants[f"torch-{dtype}"]
    backend = spec("torch").open(bundle.folder, variant, "cpu", settings)
    return _both(f"torch-{dtype}", backend.logits)


def _has_bf16() -> bool:
    return any("bf16" in name.lower() for name in instruction_sets())


def _theirs(checkpoint: Path, bundle: Path) -> dict[str, Callable[[int, int], Run]]:
    prepared: dict[str, Callable[[int, int], Run]] = {}
    if find_spec("sentence_transformers"):
        name = "bf16" if _has_bf16() else "fp32"
        dtype = torch.bfloat16 if _has_bf16() else torch.float32
        prepared[f"sentence-transformers, {name}"] = _sentence_transformers(checkpoint, dtype)
    if find_spec("optimum") and find_spec("optimum.intel"):
        prepared["optimum-intel, int8, full logits"] = _optimum(checkpoint)
    if "gguf-q4_k_m" in Manifest.load(bundle).variants:
        prepared["llama.cpp's own, q4_k_m"] = _llama(bundle / "gguf-q4_k_m" / "model.gguf")
    return prepared


def _sentence_transformers(checkpoint: Path, dtype: torch.dtype) -> Callable[[int, int], Run]:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        str(checkpoint),
        device="cpu",
        model_kwargs={"dtype": dtype},
        local_files_only=True,
    )
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def prepare(length: int, count: int) -> Run:
        # Each of these is one token of the tiny tokenizer.
        pairs = [(" a" * PREFIX, " b" * length)] * count
        found = model.tokenizer("".join(pairs[0]), add_special_tokens=False)["input_ids"]
        assert len(found) == PREFIX + length
        return partial(model.predict, pairs, batch_size=count, show_progress_bar=False)

    return prepare


def _optimum(checkpoint: Path) -> Callable[[int, int], Run]:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    model = OVModelForCausalLM.from_pretrained(
        checkpoint,
        export=True,
        quantization_config=OVWeightQuantizationConfig(bits=8, sym=False),
        local_files_only=True,
    )

    def prepare(length: int, count: int) -> Run:
        ids = torch.from_numpy(np.stack(_pairs(length, count).whole().ids).astype(np.int64))
        return lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]

    return prepare


def _llama(path: Path) -> Callable[[int, int], Run]:
    library = llama.library()
    model = llama.load(path, "cpu")

    def prepare(length: int, count: int) -> Run:
        tokens = (PREFIX + length) * count
        context = llama.new_context(
            model,
            tokens,
            count,
            n_ubatch=min(tokens, UBATCH),
            n_threads=processors(),
            n_threads_batch=processors(),
            embeddings=True,
            pooling_type=library.LLAMA_POOLING_TYPE_LAST,
        )
        whole = _pairs(length, count).whole()
        ids, placed = np.concatenate(whole.ids), llama.places(whole.lengths)
        outputs = np.ones(tokens, np.int8)

        def run() -> Any:
            library.llama_memory_clear(library.llama_get_memory(context), False)
            llama.run(library.llama_decode, context, ids, *placed, outputs)
            return ctypes.cast(library.llama_get_embeddings_seq(context, 0), ctypes.c_void_p)

        return run

    return prepare


def _load(bundle: Path, variant: str) -> dict[str, object]:
    command = [sys.executable, __file__, "--child", str(bundle), variant]
    with tempfile.TemporaryDirectory() as cache:
        new = {**os.environ, "QRANK_CACHE": cache}
        first, *later = [json.loads(subprocess.check_output(command, env=new)) for _ in range(4)]
    size = Manifest.load(bundle).variants[variant].bytes
    return {
        "target": variant,
        "first start s": first[0],
        "later starts s": statistics.median(seconds for seconds, _ in later),
        "peak MB": max(peak for _, peak in later) / 1e6,
        "on disk MB": size / 1e6,
    }


def _first_score(bundle: str, variant: str) -> tuple[float, int]:
    start = time.perf_counter()
    with Reranker(bundle, backend=variant) as reranker:
        reranker.rank("which planet is red?", ["mars", "bread"])
        return time.perf_counter() - start, peak_memory()


if __name__ == "__main__":
    main()
