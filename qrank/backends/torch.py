"""Unconverted checkpoints, run by transformers: what every conversion is compared with.

The only backend that does not run bundles: `as_bundle` creates a manifest in memory from the
checkpoint, which it reads the same way as the converters do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qrank.backends.contract import BackendSpec, Format, Options, Precision, kind, number
from qrank.backends.forks import waited_for
from qrank.bundle.family import Family
from qrank.bundle.fidelity import BFLOAT16, FLOAT16, FLOAT32, Fidelity
from qrank.bundle.manifest import Manifest, Probes, Variant
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Floats, Logits, Sequences, feed
from qrank.errors import TargetError
from qrank.scoring.batching import cut, in_halves, in_order, out_of_memory
from qrank.system.extras import need

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names for the precisions that a checkpoint can run in."""

_NEAR = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference of our logit from transformers' own, as a share of max(1, |logit|)."""

CPU_BATCH = 1024
"""Padded tokens per batch on the CPU."""

DEVICE_BATCH = 16_384
"""Padded tokens per batch on an accelerator, which needs large batches."""


def as_bundle(
    model: str, family: str | None = None, revision: str | None = None
) -> tuple[Bundle, str]:
    """A checkpoint as if it were a bundle, and the text of its tokenizer.json.

    The manifest has one variant per precision and no probes: there is nothing to compare the
    original with.

    Args:
        model: a folder, or a hub id.
        family: a card's name or file; None to find the card from the checkpoint.
        revision: of the hub repository, if `model` does not name it.

    Raises:
        MissingExtraError: torch, transformers or safetensors is not installed.
        QrankError: there is no checkpoint, or qrank cannot read it.
    """
    for package in ("torch", "transformers", "safetensors"):
        need(package, extra="torch")
    from qrank.converters.checkpoint.ids import check_ids, encode_pairs
    from qrank.converters.checkpoint.probes import probe_pairs
    from qrank.converters.checkpoint.read import read_checkpoint

    checkpoint = read_checkpoint(model, family=family, revision=revision)
    tokenizer = json.dumps(checkpoint.text_tokenizer())
    pairs = probe_pairs(checkpoint.words)
    check_ids(pairs, encode_pairs(pairs, tokenizer, checkpoint.family), checkpoint)
    exact = Fidelity(0.0, 0.0, 1.0, 1.0)
    variants = [Variant("torch", precision, {}, exact, {}) for precision in DTYPES]
    manifest = Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        source=checkpoint.source,
        files={},
        probes=Probes(Sequences([]), np.empty(0, np.float32), "itself"),
        variants={variant.name: variant for variant in variants},
        dimensions=checkpoint.dimensions,
    )
    return Bundle(checkpoint.folder, manifest), tokenizer


def version() -> str:
    """The runtime's name and version."""
    transformers = need("transformers", extra="torch")
    return (
        f"torch {need('torch', extra='torch').__version__}, transformers {transformers.__version__}"
    )


def devices() -> list[str]:
    """Devices this build of torch finds here: `cpu`, `cuda`, `cuda:1`, ..., `mps`."""
    torch = need("torch", extra="torch")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = [f"cuda:{card}" if card else "cuda" for card in range(cards)]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def memory(device: str) -> int | None:
    """Bytes of a device's own memory; None if it uses the machine's or is absent."""
    if kind(device) != "cuda" or device not in devices():
        return None
    return int(need("torch").cuda.get_device_properties(number(device)).total_memory)


def product(a: Floats, b: Floats, device: str) -> Floats:
    """The matrix product, computed on a device."""
    torch = need("torch", extra="torch")
    found = torch.as_tensor(a, device=device) @ torch.as_tensor(b, device=device)
    return np.asarray(found.cpu().numpy())


def open(folder: Path, variant: Variant, device: str, options: Options) -> TorchBackend:
    """Load a checkpoint's weights.

    Raises:
        MissingExtraError: torch, transformers or safetensors is not installed.
        TargetError: the device is absent, or a causal model computes its score in an unknown way.
        ConversionError: the weights do not fit the architecture.
    """
    if device not in (present := devices()):
        raise TargetError(
            f"{version()} here has no device {device!r}; present are: {', '.join(present)}"
        )
    from qrank.converters.checkpoint.configuration import read_config
    from qrank.converters.checkpoint.qwen_vl import HYBRID
    from qrank.converters.checkpoint.reference import run_reference
    from qrank.converters.checkpoint.scoring_graph import input_names, scorer
    from qrank.converters.checkpoint.weights import load_model

    family = options.family
    assert family is not None  # `Reranker` sets it when it runs a checkpoint
    if read_config(folder).get("model_type") in HYBRID:
        raise TargetError(
            f"{family.architecture} mixes attention with gated delta nets, whose state qrank does "
            "not share in torch: convert it with --to gguf"
        )
    model = load_model(folder, dtype=DTYPES[variant.precision])
    scoring = scorer(model, family).eval()
    if family.decoder:
        theirs = partial(run_reference, model, family=family)
        # In a separate thread, see `TorchBackend`.
        with ThreadPoolExecutor(1) as once:
            once.submit(_check, scoring, theirs, family, variant.precision).result()
    names = input_names(family)
    return TorchBackend(scoring.to(device), names, family, device, options)


def _check(
    scoring: Any, reference: Callable[[Sequences], Logits], family: Family, precision: str
) -> None:
    """Compare our scoring of a causal model with transformers' own, on a few tokens.

    A bundle has probes for that. `converters.checkpoint.attention` covers what depends on length.

    Args:
        scoring: our graph.
        reference: computes transformers' own logits.
        family: the checkpoint's.
        precision: one of DTYPES.

    Raises:
        TargetError: they differ: the score is more than the head's row times a hidden state.
    """
    torch = need("torch")
    sequences = Sequences([np.arange(100, 112, dtype=np.int32)])
    (theirs,) = reference(sequences)
    ids = torch.tensor(sequences.ids[0][None], dtype=torch.int64)
    empty = torch.zeros(scoring.prefix_shape, dtype=scoring.model.dtype)
    nothing = torch.empty(0, dtype=torch.int64)
    with torch.inference_mode():
        logits, _ = scoring(ids, torch.tensor([ids.shape[1] - 1]), empty, nothing)
    if abs(logits.item() - theirs) > _NEAR[precision] * max(1.0, abs(theirs)):
        raise TargetError(
            f"{family.architecture} makes its score in a way that qrank does not know: "
            f"transformers gives {theirs:.4g} where qrank gives {logits.item():.4g}"
        )


class TorchBackend:
    """A model and the one thread that runs it, batch by batch."""

    def __init__(
        self, scorer: Any, names: list[str], family: Family, device: str, options: Options
    ) -> None:
        self._scorer = scorer
        self._names = names
        # A child forked during a matrix product would spin on MKL's lock forever.
        self._computing = waited_for(threading.Lock())
        self._family = family
        self._device = device
        self._memory = options.memory
        # Never compute on the caller's thread: its OpenMP helper threads do not survive a fork, and
        # the child would wait for them forever. We also must not set its number of threads.
        self._worker = ThreadPoolExecutor(
            1, "qrank-torch", initializer=need("torch").set_num_threads, initargs=(options.threads,)
        )

    def logits(self, sequences: Sequences) -> Logits:
        """See `qrank.backends.Backend.logits`."""
        limit = CPU_BATCH if self._device == "cpu" else DEVICE_BATCH
        batches = cut(sequences, limit, self._memory)
        prefix = self._worker.submit(self._read, sequences).result()
        results = self._worker.map(
            lambda batch: in_halves(sequences.take(batch), lambda some: self._run(some, prefix)),
            batches,
        )
        return in_order(batches, results)

    def close(self) -> None:
        """See `qrank.backends.Backend.close`."""
        self._worker.shutdown()
        del self._scorer

    def _read(self, sequences: Sequences) -> dict[str, Any]:
        """A decoder's inputs besides the batch: the prefix's keys and values; {} for encoders."""
        if not self._family.decoder:
            return {}
        torch, count = need("torch"), len(sequences.prefix)
        dtype = self._scorer.model.dtype
        empty = torch.zeros(self._scorer.prefix_shape, dtype=dtype, device=self._device)
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        if count:
            keep = torch.arange(count, device=self._device)
            more = {"prefix": empty, "keep": keep}
            _, empty = in_halves(
                Sequences([sequences.prefix]), lambda prefix: self._call(prefix, more)
            )
        return {"prefix": empty, "keep": nothing}

    def _run(self, batch: Sequences, prefix: dict[str, Any]) -> Logits:
        found = self._call(batch, prefix)
        logits = found[0] if self._family.decoder else found
        return np.asarray(logits.float().cpu().numpy()).reshape(len(batch))

    def _call(self, batch: Sequences, more: dict[str, Any]) -> Any:
        torch = need("torch")
        inputs = feed(self._names, batch, more=more)
        try:
            with self._computing, torch.inference_mode():
                return self._scorer(
                    *(torch.as_tensor(x, device=self._device) for x in inputs.values())
                )
        except RuntimeError as error:
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise TargetError(f"torch failed on {self._device}: {error}") from error


SPEC = BackendSpec(
    runtime="torch",
    open=open,
    version=version,
    devices=devices,
    kinds=("cpu", "cuda", "mps"),
    modules=("torch", "transformers"),
    extra="torch",
    # No converter, importer or files: it runs checkpoints directly.
    format=Format(
        precisions=(
            Precision("fp32", FLOAT32, cpu=12, elsewhere=3),
            Precision("bf16", BFLOAT16, cpu=13, elsewhere=2),
            Precision("fp16", FLOAT16, cpu=14, elsewhere=1),
        ),
    ),
    memory=memory,
    product=product,
    # It runs the original, which is not compared with anything.
    in_process=lambda device: True,
)
