"""llama.cpp with and without repacked weights (`use_extra_bufts`), by precision.

If a CPU has kernels for weights in another order (AMX, and for some types AVX2 or NEON), llama.cpp
repacks the weights when it loads a file; on AMX that kernel crashes. So every case runs in its
own process, which may die. The models are `mini`, and four layers of random weights of the width of
bge-reranker-v2-m3 (rows of 1024, which K-quants fit). Both ways take turns on the same pairs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import arguments, report

from qrank.backends import Options, gguf, llama
from qrank.bundle.fidelity import Fidelity
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.sequences import Sequences
from qrank.converters.convert import convert
from qrank.converters.gguf import export as converter
from qrank.errors import QrankError
from qrank.system.machine import processors
from qrank.system.subprocess_rpc import Child, CrashError, answer

sys.path.append(str(Path(__file__).parents[1] / "tests"))

PRECISIONS = ("f16", "q8_0", "q4_k_m", "q4_0")
TOKENS = 256
PAIRS = 4
COLUMNS = {
    "model": "",
    "precision": "",
    "plain pairs/s": ".1f",
    "repacked pairs/s": ".1f",
    "plain max Δ": ".3f",
    "repacked max Δ": ".3f",
    "of spread": ".2f",
    "died": "",
}


def measure() -> None:
    """Convert, time and print."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="[default: %(default)s]")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/mini"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        wide = _wide(Path(temporary) / "wide")
        for name, source in (("mini", options.checkpoint), ("1024 wide", wide)):
            target = Path(temporary) / f"{source.name}-qrank"
            made = convert(str(source), [("gguf", "f16")], target)
            for precision in PRECISIONS:
                _quantize(made.folder, precision)
                row = _compare(name, made.folder, made.manifest, precision, options.rounds)
                rows.append(row)
    report("llama.cpp's repacked weights", COLUMNS, rows, as_json=options.json)


def _wide(folder: Path) -> Path:
    """A random XLM-RoBERTa of four wide layers."""
    import tiny
    from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

    checkpoint = tiny.CHECKPOINTS["xlm-roberta"](folder)
    config = AutoConfig.from_pretrained(checkpoint)
    config.update(
        {
            "hidden_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
        }
    )
    set_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(checkpoint)
    return checkpoint


def _quantize(bundle: Path, precision: str) -> None:
    folder = bundle / f"gguf-{precision}"
    if folder.exists():
        return
    folder.mkdir()
    converter._FTYPES["q4_0"] = 2
    converter._quantize(bundle / "gguf-f16" / gguf.FILE, folder / gguf.FILE, precision, {})


def _compare(
    name: str, bundle: Path, manifest: Manifest, precision: str, rounds: int
) -> dict[str, object]:
    """One row: run both ways in turns."""
    ways = {"plain": False, "repacked": True}
    children = {way: Child("llama_buffers") for way in ways}
    row: dict[str, object] = {"model": name, "precision": precision}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    died = []
    question = {"folder": str(bundle), "precision": precision}
    for way, repacked in ways.items():
        try:
            found = children[way].ask({"do": "open", "repacked": repacked, **question}, 600)
            row[f"{way} max Δ"] = found["max"]
            row["of spread"] = float(np.ptp(manifest.probes.logits))
        except CrashError as error:
            died.append(f"{way}: {error.how}")
        except QrankError as error:
            died.append(f"{way}: {error}")
    alive = [way for way in ways if f"{way} max Δ" in row]
    for number in range(rounds + 1):
        for way in alive if number % 2 else reversed(alive):
            taken = children[way].ask({"do": "run"}, 600)["seconds"]
            if number:
                seconds[way].append(taken)
    for way in alive:
        children[way].close()
        row[f"{way} pairs/s"] = PAIRS / median(seconds[way])
    row["died"] = "; ".join(died) or "no"
    return row


class Case:
    """In the child process: a file, opened in one of the two ways."""

    def open(self, folder: str, precision: str, repacked: bool) -> dict[str, float]:
        """Open the file and compare its logits with those of the probes."""
        llama.repacks = lambda: repacked
        variant = Variant("gguf", precision, {}, Fidelity(0, 0, 0, 0), {})
        self._backend = gguf.open(Path(folder), variant, "cpu", Options(processors()))
        probes = Manifest.load(Path(folder)).probes
        numbers = np.random.default_rng(0)
        vocabulary = max(int(ids.max()) for ids in probes.work.ids)
        ids = [numbers.integers(5, vocabulary, TOKENS).astype(np.int32) for _ in range(PAIRS)]
        types = [np.zeros(TOKENS, np.int8) for _ in range(PAIRS)]
        self._work = Sequences(ids, None if probes.work.segments is None else types)
        off = np.abs(self._backend.logits(probes.work) - probes.logits)
        return {"max": float(off.max())}

    def run(self) -> dict[str, float]:
        """Score the pairs."""
        start = time.perf_counter()
        self._backend.logits(self._work)
        return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Answer the parent, in the child process."""
    case = Case()
    answer({"open": case.open, "run": case.run})


if __name__ == "__main__":
    measure()
