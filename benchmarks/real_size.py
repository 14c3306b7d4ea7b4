"""Conversion and speed at the sizes of real rerankers, with random weights.

Needs no hub: a tiny checkpoint of the tests gets a real model's dimensions. Time and memory are
those of the real model. Fidelity is that of random weights, so no variant is refused here: 24
layers of them amplify rounding, unlike trained ones. Every variant is converted in its own process.
Then all variants, the checkpoint itself in torch and, with `--peer-python`, sentence-transformers
and optimum-intel score the same pairs in turns, of 128 and of 512 tokens and of uneven lengths. For
decoders, whose speed `decoders.py` measures, this measures the memory of a process that ranks 20
documents of 128 tokens: all of it, and the part that is not file-backed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import limit
import torch
from common import alternate, arguments, report, tolerate_anything
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    set_seed,
)
from vs_peers import opened

from qrank import Reranker
from qrank.bundle.manifest import Manifest
from qrank.converters import fidelity, ranking, sources
from qrank.converters.convert import convert as make_bundle
from qrank.system.machine import peak_memory, processors

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny
import tiny_chains
import tiny_decoders
import tiny_encoders

ENCODERS = tiny.CHECKPOINTS | tiny_encoders.CHECKPOINTS

_MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_ETTIN = {
    "vocab_size": 50368,
    "max_position_embeddings": 7999,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
}
_QWEN3 = {
    "vocab_size": 151669,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "MiniLM-L6": (
        "bert",
        {**_MINILM, "num_hidden_layers": 6, "vocab_size": 30522, "max_position_embeddings": 512},
    ),
    "MiniLM-L12": (
        "bert",
        {**_MINILM, "num_hidden_layers": 12, "vocab_size": 30522, "max_position_embeddings": 512},
    ),
    "ettin-reranker-17m": (
        "modernbert-cls",
        {
            **_ETTIN,
            "hidden_size": 256,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "intermediate_size": 384,
        },
    ),
    "ettin-reranker-150m": (
        "modernbert-cls",
        {
            **_ETTIN,
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
        },
    ),
    "gte-reranker-modernbert-base": (
        "modernbert-mean",
        {
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
            "vocab_size": 50368,
            "max_position_embeddings": 8192,
            "global_attn_every_n_layers": 3,
            "local_attention": 128,
        },
    ),
    "bge-reranker-v2-m3": (
        "xlm-roberta",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "vocab_size": 250002,
            "max_position_embeddings": 8194,
        },
    ),
    "mxbai-rerank-base-v1": (
        "deberta-v2",
        {
            "hidden_size": 768,
            "pooler_hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "vocab_size": 128100,
            "max_position_embeddings": 512,
            "position_buckets": 256,
        },
    ),
    "Qwen3-Reranker-0.6B": (
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 3072,
        },
    ),
    "Qwen3-Reranker-4B": (
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 9728,
        },
    ),
}
"""Name -> a tiny checkpoint of the tests, and the real model's values for its configuration."""

VARIANTS = ("onnx-int8", "openvino-int8", "openvino-int8-w8a8", "gguf-q4_k_m", "gguf-q8_0")
DECODER_VARIANTS = ("openvino-int8", "openvino-int4", "gguf-q4_k_m", "gguf-q8_0")
LENGTHS = (128, 512)
MIX = (225, 90, 512, 130, 175, 60, 300, 110, 255, 150, 380, 200)
"""Tokens of documents as uneven as Cranfield's abstracts: 52 to 512, 220 in the mean."""
MIXED = "uneven"

PEERS = (
    "sentence-transformers, fp32",
    "sentence-transformers, bf16",
    "sentence-transformers, OpenVINO",
    "optimum-intel, int8",
)
"""Those of one environment (README.md)."""
SHORT = 40
HEAD_GAIN = 6.0
"""Factor for the classifier's weights, so that logits spread over some units."""

INTO_RESIDUAL = ("output.dense.weight", "attn.Wo.weight", "mlp.Wo.weight")
RESIDUAL = 0.5
"""Factor for the weights of what a layer adds to its input: 24 layers with full weights forget the
text, and int8 then moves the logits twice as far, relative to their spread."""

CONVERSION = {
    "variant": "",
    "seconds": ",.0f",
    "peak MB": ",.0f",
    "size MB": ",.0f",
    "max Δ": ".2%",
    "Kendall": ".3f",
}

SCORING = {
    "variant": "",
    "size MB": ",.0f",
    "peak MB": ",.0f",
    "anonymous MB": ",.0f",
    "bar MB": ",.0f",
    "first score s": ",.1f",
    "rank s": ",.1f",
}
DOCUMENTS = 20
BAR = (1.25, 1e9)
"""Memory limit for scoring: this many times the size of the files, plus this many bytes."""


def main() -> None:
    """Make, convert and time every shape."""
    parser = arguments(__doc__)
    encoders = [shape for shape, (kind, _) in SHAPES.items() if kind in ENCODERS]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=encoders)
    parser.add_argument(
        "--variants", nargs="+", help="[default: int8 of each format, and q4_k_m, q8_0]"
    )
    parser.add_argument(
        "--pairs", type=int, default=12, help="of 128 tokens a round; a quarter of 512"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--child", nargs=3, metavar=("CHECKPOINT", "BUNDLE", "VARIANT"), help="(internal)"
    )
    parser.add_argument("--scoring", nargs=2, metavar=("BUNDLE", "VARIANT"), help="(internal)")
    parser.add_argument("--peer-python", type=Path, help="of the peers with OpenVINO (README.md)")
    parser.add_argument(
        "--batches", nargs="+", type=int, help="tokens of a batch  [default: the backend's own]"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"cut texts of probes and calibration to {SHORT} characters: a tenth of the time",
    )
    parser.add_argument("--work", type=Path, help="folder to keep checkpoints and bundles in")
    options = parser.parse_args()
    tolerate_anything()
    if options.short:
        _shorten()
    if options.child:
        checkpoint, bundle, variant = options.child
        format, _, precision = variant.partition("-")
        family = tiny_decoders.FAMILIES.get(SHAPES[Path(checkpoint).name][0])
        wanted = [(format, precision)]
        make_bundle(checkpoint, wanted, Path(bundle), family=family, min_agreement=-1)
        sys.stdout.write(json.dumps(peak_memory()))
        return
    if options.scoring:
        sys.stdout.write(json.dumps(_scoring(*options.scoring)))
        return
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            checkpoint, bundle = work / shape, work / f"{shape}-bundle"
            if not checkpoint.exists():
                make(shape, checkpoint)
            title = f"{shape}, {_parameters(checkpoint) / 1e6:,.0f}M random parameters"
            decoder = SHAPES[shape][0] in tiny_decoders.CHECKPOINTS
            variants = options.variants or list(DECODER_VARIANTS if decoder else VARIANTS)
            made = Manifest.load(bundle).variants if bundle.exists() else {}
            flags = ["--short"] * options.short
            rows = [convert(checkpoint, bundle, v, *flags) for v in variants if v not in made]
            report(f"Converting {title}", CONVERSION, rows, as_json=options.json)
            if decoder:
                rows = [scoring(bundle, variant) for variant in variants]
                report(f"Memory of scoring, {title}", SCORING, rows, as_json=options.json)
                continue
            rows = speed(checkpoint, bundle, variants, options)
            columns = {"target": "", **dict.fromkeys(_lengths(options.pairs), ",.1f")}
            columns |= {"vs fastest peer": ".2f", "of best": ".0%"}
            report(f"Pairs/s with {title}", columns, rows, as_json=options.json)


def make(shape: str, folder: Path) -> None:
    """Write a random checkpoint of a shape in fp32."""
    name, sizes = SHAPES[shape]
    (ENCODERS | tiny_decoders.CHECKPOINTS)[name](folder)
    if name in tiny_decoders.CHECKPOINTS:
        _make_decoder(folder, sizes)
        return
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["model_max_length"] = min(sizes["max_position_embeddings"], 8192)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    # The list with an item per layer is the tiny model's; None derives it from the sizes.
    tiny.edit_config(folder, **sizes, layer_types=None)
    set_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    head = getattr(model.classifier, "out_proj", model.classifier)
    tiny.widen(model, head, HEAD_GAIN)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(INTO_RESIDUAL):
                parameter.mul_(RESIDUAL)
    model.save_pretrained(folder)
    if shape.startswith("ettin"):
        plain = folder.rename(folder.with_name(f"{folder.name}-plain"))
        tiny_chains.chain(plain, folder, tiny_chains.ETTIN)


def _make_decoder(folder: Path, sizes: dict[str, int]) -> None:
    """Give a tiny decoder its real size, in bf16 like the real checkpoints."""
    tiny.edit_config(folder, **sizes, layer_types=None)
    set_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tiny_decoders.widen(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(RESIDUAL)
    model.save_pretrained(folder)


def _parameters(checkpoint: Path) -> int:
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def _shorten() -> None:
    """Cut the texts that a conversion runs the original on."""
    for module, name in ((fidelity, "probe_pairs"), (sources, "calibration_pairs")):
        pairs = vars(module)[name]
        vars(module)[name] = lambda *given, pairs=pairs: [
            (query[:SHORT], document[:SHORT]) for query, document in pairs(*given)
        ]
    whole = ranking.ranking_data()
    queries = [(query[:SHORT], [text[:SHORT] for text in texts]) for query, texts in whole.queries]
    vars(ranking)["ranking_data"] = lambda: replace(whole, queries=queries)


def convert(checkpoint: Path, bundle: Path, variant: str, *flags: str) -> dict[str, object]:
    """Convert to one variant in its own process, and return its time and peak memory."""
    command = [sys.executable, __file__, *flags]
    command += ["--child", str(checkpoint), str(bundle), variant]
    start = time.perf_counter()
    child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - start
    made = Manifest.load(bundle).variants[variant]
    return {
        "variant": variant,
        "seconds": seconds,
        "peak MB": json.loads(child.stdout) / 1e6,
        "size MB": sum(file.bytes for file in made.files.values()) / 1e6,
        "max Δ": made.fidelity.max_abs / made.fidelity.spread,
        "Kendall": made.fidelity.kendall,
    }


def scoring(bundle: Path, variant: str) -> dict[str, object]:
    """The memory that ranking takes in its own process, and its limit."""
    command = [sys.executable, __file__, "--scoring", str(bundle), variant]
    found = json.loads(subprocess.check_output(command))
    size = Manifest.load(bundle).variants[variant].bytes
    return {
        "variant": variant,
        "size MB": size / 1e6,
        "peak MB": found["peak"] / 1e6,
        "anonymous MB": found["anonymous"] / 1e6,
        "bar MB": (BAR[0] * size + BAR[1]) / 1e6,
        "first score s": found["first"],
        "rank s": found["rank"],
    }


def _scoring(bundle: str, variant: str) -> dict[str, float | None]:
    """Rank; return peak memory, peak anonymous (not file-backed) memory, and seconds."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text("utf-8")
            most = max(most, int(status.partition("RssAnon:")[2].split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with Reranker(bundle, backend=variant) as reranker:
        reranker.rank("what is it", ["a b"])
        first = time.perf_counter() - start
        texts = [
            " ".join("abcdefgh"[(i + j) % 8] for j in range(LENGTHS[0])) for i in range(DOCUMENTS)
        ]
        start = time.perf_counter()
        reranker.rank("what is it", texts)
        seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"peak": peak_memory(), "anonymous": most, "first": first, "rank": seconds}


def speed(
    checkpoint: Path,
    bundle: Path,
    variants: list[str],
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """Median pairs per second of every target at every length, and of the peers."""
    threads = processors()
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    size = (config["hidden_size"], config["intermediate_size"])
    best = limit.best(*size, threads, rounds=5)
    speeds: dict[str, dict[str, float]] = {}
    for column, lengths in _lengths(options.pairs).items():
        # Longer than fits, so that a pair of the maximum length has just that.
        texts = [
            ("what is it", " ".join("abcdefgh"[(i + j) % 8] for j in range(length)))
            for i, length in enumerate(lengths)
        ]
        longest = max(lengths)
        with ExitStack() as stack:
            cases: dict[str, Callable[[], object]] = {}
            for name in variants:
                for batch in options.batches or [None]:
                    label = name if batch is None else f"{name}, {batch} a batch"
                    target = stack.enter_context(
                        Reranker(bundle, backend=name, max_length=longest, max_batch_tokens=batch)
                    )
                    if dtype := target.choice.options.compute_dtype:
                        label += f" ({dtype})"
                    cases[label] = partial(target.score, texts, raw=True)
            target = stack.enter_context(Reranker(checkpoint, backend="torch", max_length=longest))
            cases["torch-fp32"] = partial(target.score, texts, raw=True)
            for name in PEERS if options.peer_python else ():
                script = Path(__file__).with_name("peer.py")
                command = [options.peer_python, script, name, checkpoint, bundle, threads]
                ask = stack.enter_context(opened([*map(str, command)], threads, tokens=longest))
                case = partial(ask, texts[0][0], [document for _, document in texts])
                try:
                    case()
                except RuntimeError as error:
                    sys.stderr.write(f"left out: {error}\n")
                    continue
                cases[name] = case
            seconds = alternate(cases, options.rounds)
        for name, found in seconds.items():
            speeds.setdefault(name, {})[column] = len(texts) / statistics.median(found)
    best = limit.best(*size, threads, rounds=5, earlier=best)
    mixed = _lengths(options.pairs)[MIXED]
    work = limit.operations(config, mixed) / len(mixed)
    fastest = max((speeds[name][MIXED] for name in PEERS if name in speeds), default=None)
    return [
        {
            "target": name,
            **found,
            "vs fastest peer": fastest and found[MIXED] / fastest,
            "of best": found[MIXED] * work / best[limit.arithmetic(name)][1],
        }
        for name, found in speeds.items()
    ]


def _lengths(pairs: int) -> dict[str, list[int]]:
    """Column -> tokens of each document that is timed."""
    same = {f"at {length}": [length] * max(2, pairs * LENGTHS[0] // length) for length in LENGTHS}
    return {**same, MIXED: [MIX[i % len(MIX)] for i in range(max(pairs, len(MIX)))]}


if __name__ == "__main__":
    main()
