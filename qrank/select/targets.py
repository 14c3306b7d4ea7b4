"""Which targets a bundle has, before any is opened; and the static guess of their order."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from qrank.backends import BACKENDS, FORMATS, RUNTIMES, module, others, reads
from qrank.bundle.manifest import Manifest, Variant
from qrank.errors import TargetError
from qrank.system.extras import installed

log = logging.getLogger("qrank")

ON_CPU = (
    "openvino-int8",
    "onnx-int8",
    "openvino-int8-w8a8",
    "openvino-fp16",
    "onnx-fp32",
    "onnx-fp16",
    "gguf-q8_0",
    "gguf-q4_k_m",
    "gguf-f16",
    "torch-fp32",
    "torch-bf16",
    "torch-fp16",
)
"""Variants by the speed to be expected of them on a CPU (docs/benchmarks.md), the first the most.

int8-w8a8 stands behind int8: it is a little faster, and less like the original."""

ELSEWHERE = ("fp16", "int8", "fp32", "int8-w8a8", "f16", "q8_0", "q4_k_m", "bf16")
"""Precisions likewise, on every other device: they compute in 16 bits."""


@dataclass(frozen=True)
class Target:
    """A variant on a device, run by a backend.

    Attributes:
        variant: what runs.
        device: lower case.
        backend: its format's own; or another package's; or "module:function" of a user's own.
    """

    variant: Variant
    device: str
    backend: str

    @property
    def name(self) -> str:
        """`onnx-int8@cpu`; run by another package's backend, `its-name/onnx-int8@cpu`."""
        own = self.backend == self.variant.format or ":" in self.backend
        return f"{self.selector if not own else self.variant.name}@{self.device}"

    @property
    def selector(self) -> str:
        """What names variant and backend where a backend is asked for."""
        if self.backend == self.variant.format:
            return self.variant.name
        return f"{self.backend}/{self.variant.name}"


def guesses(manifest: Manifest, backend: str | None, device: str | None) -> list[Target]:
    """Targets in the order of the speed to be expected, without a look at the machine.

    Args:
        manifest: of the bundle.
        backend: a format (`onnx`), a variant (`onnx-fp32`), another package's backend, alone or
            with a variant (`name/onnx-fp32`), or "module:function"; None: every format whose
            runtime is installed, or every one if none is.
        device: lower case; None: the CPU.

    Raises:
        TargetError: the bundle has no such variant, or none whose backend knows such a device.
    """
    runner, variants = _wanted(manifest, backend)
    device = device or "cpu"
    if backend is None:
        readable = _readable(manifest)
        variants = [v for v in readable if _kind(device) in module(v.format).DEVICES]
        if not variants:
            formats = dict.fromkeys(variant.format for variant in readable)
            known = {format: ", ".join(module(format).DEVICES) for format in formats}
            raise TargetError(
                f"no device {device!r} for the bundle {manifest.name}; its formats may have: "
                + "; ".join(f"{format} {devices}" for format, devices in known.items())
            )
        variants = [v for v in variants if installed(RUNTIMES[v.format])] or variants
    targets = [Target(variant, device, runner or variant.format) for variant in variants]
    return sorted(targets, key=expected)


def _readable(manifest: Manifest) -> list[Variant]:
    """The variants of formats this qrank knows; others are told of."""
    known = [v for v in manifest.variants.values() if v.format in BACKENDS]
    if unknown := [v.name for v in manifest.variants.values() if v.format not in BACKENDS]:
        log.warning(
            "leaving out %s of the bundle %s: this qrank knows the formats %s",
            ", ".join(unknown),
            manifest.name,
            ", ".join(FORMATS),
        )
    if not known:
        raise TargetError(
            f"the bundle {manifest.name} has {', '.join(manifest.variants) or 'no variant'}; this "
            f"qrank knows the formats {', '.join(FORMATS)}: convert the model again, or install "
            "the qrank that wrote it"
        )
    return known


def _wanted(manifest: Manifest, backend: str | None) -> tuple[str | None, list[Variant]]:
    """The backend where it is not the format's own, and the variants a name stands for."""
    every = list(manifest.variants.values())
    if backend is None or ":" in backend:
        return backend, every
    if found := [v for v in every if v.format in BACKENDS and backend in (v.format, v.name)]:
        return None, found
    name, _, variant = backend.partition("/")
    if name not in BACKENDS and name in others():
        formats = reads(name)
        found = [v for v in every if v.format in formats and variant in ("", v.name)]
        if found:
            return name, found
    raise TargetError(
        f"the bundle {manifest.name} has no variant for backend {backend!r}; it has: "
        f"{', '.join(manifest.variants)}; backends are: {', '.join((*BACKENDS, *others()))}"
    )


def expected(target: Target) -> tuple[int, int]:
    """A sort key: the faster, as one may expect, the smaller."""
    variant = target.variant
    by_name = {name: place for place, name in enumerate(ON_CPU)}
    by_precision = {name: place for place, name in enumerate(ELSEWHERE)}
    if target.device == "cpu":
        place = by_name.get(variant.name, len(by_name))
    else:
        place = by_precision.get(variant.precision, len(by_precision))
    return place, [*FORMATS, variant.format].index(variant.format)


def _kind(device: str) -> str:
    """The kind of a device that has a number: `gpu` of `gpu.1`."""
    return device.partition(".")[0]
