"""Checkpoints as they are, by transformers itself: what every conversion is compared with.

The one backend that runs no bundle: `as_bundle` makes a manifest in memory of what the checkpoint
says, with the converters' own reading of it.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qrank.backends import Options
from qrank.batching import cut_padded, in_order
from qrank.bundle import Manifest, Probes, Variant
from qrank.errors import TargetError
from qrank.extras import need
from qrank.fidelity import Fidelity
from qrank.work import Logits, Work, padded

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names of the precisions that a checkpoint can be run in."""

CPU_BATCH = 1024
"""Padded tokens a batch on the CPU."""

DEVICE_BATCH = 16_384
"""Padded tokens a batch on an accelerator, which wants large ones."""


def as_bundle(model: str) -> tuple[Path, Manifest, str]:
    """A checkpoint as if it were a bundle: its folder, a manifest, and a tokenizer.json's text.

    The manifest has a variant a precision and no probes: there is nothing to hold the original
    against.

    Raises:
        MissingExtraError: torch, transformers or safetensors is not installed.
        QrankError: no checkpoint is there, or none that qrank reads.
    """
    for package in ("torch", "transformers", "safetensors"):
        need(package, extra="torch")
    from qrank.converters.checkpoint import read_checkpoint
    from qrank.converters.tokenizer import text_tokenizer

    checkpoint = read_checkpoint(model)
    exact = Fidelity(0.0, 0.0, 1.0, 1.0)
    variants = [Variant("torch", precision, {}, exact, {}) for precision in DTYPES]
    manifest = Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        source=checkpoint.source,
        files={},
        probes=Probes(Work([]), np.empty(0, np.float32), "itself"),
        variants={variant.name: variant for variant in variants},
    )
    original = json.loads(checkpoint.tokenizer.backend_tokenizer.to_str())
    return checkpoint.folder, manifest, json.dumps(text_tokenizer(original))


def version() -> str:
    """The runtime's name and version."""
    transformers = need("transformers", extra="torch")
    return f"torch {need('torch', extra='torch').__version__}, {transformers.__version__}"


def devices() -> list[str]:
    """Devices this build of torch finds here."""
    torch = need("torch", extra="torch")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(device for device, there in present.items() if there)]


def open(folder: Path, variant: Variant, device: str, options: Options) -> TorchBackend:
    """Load a checkpoint's weights.

    Raises:
        MissingExtraError: torch, transformers or safetensors is not installed.
        TargetError: the device is absent.
        ConversionError: the weights do not fit the architecture.
    """
    if device not in (present := devices()):
        raise TargetError(
            f"{version()} here has no device {device!r}; present are: {', '.join(present)}"
        )
    from qrank.converters.checkpoint import load_model
    from qrank.scoring_graph import EncoderScorer

    model = load_model(folder, dtype=DTYPES[variant.precision], attention="sdpa")
    return TorchBackend(EncoderScorer(model).to(device).eval(), device, options.threads)


class TorchBackend:
    """A model and the one thread that runs it, batch by batch."""

    def __init__(self, scorer: Any, device: str, threads: int) -> None:
        self._scorer = scorer
        self._device = device
        # Never the caller's thread: OpenMP's helpers of a thread do not survive a fork, and it
        # would wait for them. Nor would its number of threads be ours to set.
        self._worker = ThreadPoolExecutor(
            1, "qrank-torch", initializer=need("torch").set_num_threads, initargs=(threads,)
        )

    def logits(self, work: Work) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        limit = CPU_BATCH if self._device == "cpu" else DEVICE_BATCH
        batches = cut_padded(work.lengths, limit)
        results = self._worker.map(lambda batch: self._run(work.take(batch)), batches)
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._worker.shutdown()
        del self._scorer

    def _run(self, batch: Work) -> Logits:
        torch = need("torch")
        try:
            with torch.inference_mode():
                inputs = [torch.from_numpy(x).to(self._device) for x in padded(batch).values()]
                logits: Logits = self._scorer(*inputs).cpu().numpy().reshape(len(batch))
        except RuntimeError as error:
            raise TargetError(f"torch failed on {self._device}: {error}") from error
        return logits
