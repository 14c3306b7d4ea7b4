"""The description of a backend: one `BackendSpec`, called SPEC, in the backend's own file.

Everything else that depends on the backend is derived from it: the list of formats and precisions,
help texts and the documentation's tables, what `qrank doctor` checks and what `qrank tune` tries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qrank.bundle.family import Family
from qrank.bundle.fidelity import Tolerance
from qrank.bundle.manifest import Variant
from qrank.bundle.sequences import Floats, Logits, Sequences
from qrank.scoring.memory import MemoryBudget
from qrank.system.extras import installed, need, pip_line


@dataclass(frozen=True)
class Options:
    """How a backend runs.

    Attributes:
        threads: total number of CPU threads it may use.
        compute_dtype: data type to compute in: `fp32`, `bf16` or `fp16`. None: the most precise.
        max_batch_tokens: padded tokens per batch; None: the backend's default. Not every backend
            limits batches this way.
        static_shapes: run few shapes, as NPUs and TensorRT require, if the backend can.
        family: of the model; None if the bundle's files hold everything the backend needs.
        memory: budget for batches. The backend cuts batches to fit it, and reserves memory for
            each, waiting if necessary.
    """

    threads: int
    compute_dtype: str | None = None
    max_batch_tokens: int | None = None
    static_shapes: bool = False
    family: Family | None = None
    memory: MemoryBudget = field(default_factory=MemoryBudget)


class Backend(Protocol):
    """Scores sequences with one variant on one device. Safe to call from several threads."""

    def logits(self, sequences: Sequences, /) -> Logits:
        """One raw logit per sequence, in the order of `sequences`, shape [n]."""

    def close(self) -> None:
        """Free the model. No call may follow.

        A backend that is dropped without `close` must free its model itself, without blocking.
        """


class Opener(Protocol):
    """The type of `BackendSpec.open`, and of a user's own function."""

    def __call__(
        self, folder: Path, variant: Variant, device: str, options: Options
    ) -> Backend: ...


def kind(device: str) -> str:
    """The kind of a device, without its number: `gpu` for `gpu.1`, `cuda` for `cuda:1`."""
    return re.split("[.:]", device, maxsplit=1)[0]


def number(device: str) -> int:
    """The number of a present device among those of its kind: 1 for `cuda:1`, 0 for `cuda`."""
    return int(device.partition(":")[2] or 0)


PLAIN = ("model", "openvino_model")
"""Names of ONNX and OpenVINO files that do not name a precision: they are fp32."""


def _words(*names: str) -> str:
    """A regular expression for file names that contain one of these words."""
    return rf"(?:^|[-_.])(?:{'|'.join(names)})(?:[-_.]|$)"


GRAPH_STEMS = {
    "int8": _words("int8", "quantized", "uint8", "qint8"),
    "fp16": _words("fp16"),
    "fp32": f"^(?:{'|'.join(PLAIN)})$",
    "int4": _words("int4", "q4", "q4f16"),
}
"""`Precision.stem` of ONNX and OpenVINO files."""


@dataclass(frozen=True)
class Precision:
    """A precision that a format's files may have.

    Attributes:
        name: the format's name for it: `int8`, `q4_k_m`.
        tolerance: of a conversion to it.
        made: whether checkpoints are converted to it. If not, only prebuilt files have it.
        bytes: per number on disk, if it is made.
        cpu: rank by expected speed on a CPU, among all variants, 1 the fastest
            (docs/benchmarks.md).
        elsewhere: rank by expected speed on other devices, among all precisions.
        stem: a regular expression that finds the precision in the name of a prebuilt file, in
            lower case and without its suffix. If there are several files and the user names no
            precision, only precisions with a `stem` are considered. None: the file name ends with
            the precision's name.
    """

    name: str
    tolerance: Tolerance
    made: bool = True
    bytes: float = 1.0
    cpu: float = math.inf
    elsewhere: float = math.inf
    stem: str | None = None


@dataclass(frozen=True)
class Format:
    """The file format that a backend brings; it has the backend's name.

    Attributes:
        precisions: the default precision comes first.
        converter: the module that converts checkpoints to it; see
            `qrank.converters.makers.Maker`. "": there is none.
        exporters: other programs that convert checkpoints to it, by name, with the module that
            runs each; like `converter`.
        importer: the module that imports prebuilt files, with `precision`, `import_file` and
            MODULES. "": there is none.
        suffix: of prebuilt files.
        weights: a pattern for the files that hold a prebuilt file's weights; `{name}` is the
            file's name and `{stem}` the name without its suffix. "": only the file itself.
        unasked: whether checkpoints are converted to it if no format is named.
    """

    precisions: tuple[Precision, ...]
    converter: str = ""
    exporters: Mapping[str, str] = field(default_factory=dict)
    importer: str = ""
    suffix: str = ""
    weights: str = ""
    unasked: bool = True

    def precision(self, name: str) -> Precision | None:
        """The precision of this name; None if the format does not have it."""
        return next((precision for precision in self.precisions if precision.name == name), None)

    @property
    def made(self) -> list[str]:
        """Names of the precisions that checkpoints can be converted to, the default first."""
        return [precision.name for precision in self.precisions if precision.made]


def _none(device: str) -> Sequence[str]:
    return ()


def _no_sizes(device: str) -> Sequence[int]:
    return ()


def _unknown(device: str) -> int | None:
    return None


def _silent(device: str) -> str:
    return ""


def _apart(device: str) -> bool:
    return False


def _usual(device: str) -> float:
    return 1.0


@dataclass
class BackendSpec:
    """A backend. Creating a spec imports no runtime; calling its functions may.

    The backend is named after its file in `qrank/backends`, or after its entry point.

    Attributes:
        open: loads a variant.
        version: the runtime's name and version.
        devices: the devices present, lower case.
        runtime: the common name of the library it runs on; "" if that is the backend's name.
        kinds: every kind of device it supports, present or not.
        modules: modules it imports. Other packages declare theirs in their own metadata.
        extra: the extra of qrank that installs the modules.
        format: the format it brings; None if it only runs formats of other backends.
        reads: formats of other backends that it runs.
        compute_dtypes: data types it can compute in on a device, fastest first; empty if there is
            no choice.
        batches: values of `Options.max_batch_tokens` worth trying on a device, the default first.
        memory: bytes of a device other than the CPU; None if it uses the machine's memory, if the
            size is unknown or if there is no such device.
        product: the matrix product, computed on a device; used by `qrank doctor`.
        in_process: whether its first run on a device may be in the user's process. If not, it runs
            in a separate process first, as it may crash or hang.
        patience: how many times longer than others it may compute on a device before it counts as
            hung.
        note: a hint for users about a working device; usually "".
        conflict: what is wrong with its installation, and how to fix it; usually "".
    """

    open: Opener
    version: Callable[[], str]
    devices: Callable[[], list[str]]
    runtime: str = ""
    kinds: tuple[str, ...] = ("cpu",)
    modules: tuple[str, ...] = ()
    extra: str = ""
    format: Format | None = None
    reads: tuple[str, ...] = ()
    compute_dtypes: Callable[[str], Sequence[str]] = _none
    batches: Callable[[str], Sequence[int]] = _no_sizes
    memory: Callable[[str], int | None] = _unknown
    product: Callable[[Floats, Floats, str], Floats] | None = None
    in_process: Callable[[str], bool] = _apart
    patience: Callable[[str], float] = _usual
    note: Callable[[str], str] = _silent
    conflict: Callable[[], str] = str

    def missing(self) -> str | None:
        """The first of its modules that is not installed; None if all are."""
        return next((module for module in self.modules if not installed(module)), None)

    def require(self) -> None:
        """Check that its modules are installed.

        Raises:
            MissingExtraError: one is missing.
        """
        if (module := self.missing()) is not None:
            need(module, extra=self.extra)

    @property
    def pip_line(self) -> str:
        """The command that installs its modules; "" for another package's backend."""
        return pip_line(self.extra) if self.extra else ""
