"""Candidates to measure: every variant on every device, in each compute dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qrank.bundle.manifest import Manifest
from qrank.measure.discover import Found
from qrank.select.measurements import Measurement
from qrank.select.targets import Target, expected


@dataclass(frozen=True)
class Candidate:
    """A target and how it runs: see `Measurement`."""

    target: Target
    compute_dtype: str | None
    threads: int
    max_batch_tokens: int | None = None

    @property
    def name(self) -> str:
        """`openvino-int8@cpu bf16`."""
        return f"{self.target.name} {self.compute_dtype or ''}".rstrip()

    def measured(self, **fields: Any) -> Measurement:
        """A measurement of this candidate; `fields` are its results."""
        known = {"kendall": self.target.variant.fidelity.kendall, **fields}
        return Measurement(
            self.target.key,
            compute_dtype=self.compute_dtype,
            threads=self.threads,
            max_batch_tokens=self.max_batch_tokens,
            bytes=self.target.variant.bytes,
            **known,
        )


def candidates(manifest: Manifest, found: Iterable[Found], threads: int) -> list[Candidate]:
    """Every variant on every device of every backend that reads it, in each compute dtype.

    Those expected to be fastest come first, so that much slower ones are soon recognized; the CPU
    comes after other devices.
    """
    made = [
        Candidate(Target(variant, device.name, backend.backend), compute_dtype, threads)
        for backend in found
        for variant in manifest.variants.values()
        if variant.format in backend.formats
        for device in backend.devices
        for compute_dtype in device.compute_dtypes
    ]
    return sorted(made, key=lambda c: (c.target.device == "cpu", *expected(c.target)))
