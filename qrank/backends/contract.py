"""What a backend says about itself: one `BackendSpec`, called SPEC, in the backend's own file.

Everything else that depends on the backend follows from it: which formats and precisions there are,
what help texts and the README's tables say, what `qrank doctor` checks, what `qrank tune` tries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        threads: CPU threads it may use in all.
        compute_dtype: arithmetic to compute in: `fp32`, `bf16` or `fp16`. None: the most exact.
        max_batch_tokens: padded tokens a batch; None: the backend's own choice. Not every backend
            cuts so.
        static_shapes: compile for fixed lengths, as an NPU needs it, where a backend compiles.
        family: of the model; None where a bundle's own files say what is to be known.
        memory: for batches. The backend cuts them so that they fit, and waits for it.
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
        """One raw logit a sequence, in the order of `sequences`, shape [n]."""

    def close(self) -> None:
        """Free the model. No call may follow.

        One that is dropped without this must free it by itself, and wait for nothing then.
        """


class Opener(Protocol):
    """A `BackendSpec.open`, or a user's own."""

    def __call__(
        self, folder: Path, variant: Variant, device: str, options: Options
    ) -> Backend: ...


PLAIN = ("model", "openvino_model")
"""Names of ONNX and OpenVINO files that say nothing of a precision: they are fp32."""


def _words(*names: str) -> str:
    """A regular expression for file names that have one of these words in them."""
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
        name: the format's own: `int8`, `q4_k_m`.
        tolerance: what a conversion to it may lose.
        made: whether checkpoints are converted to it. If not, only prebuilt files have it.
        bytes: that a number takes on disk, where it is made.
        cpu: place by the speed to be expected on a CPU, among all variants, 1 the fastest
            (docs/benchmarks.md).
        elsewhere: likewise on other devices, among all precisions.
        stem: a regular expression that finds the precision in the name of a prebuilt file, in
            lower case and without its suffix. Where several files are offered and nobody names a
            precision, only those with a `stem` are looked for. None: the name, at the end.
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
    """The file format that a backend brings, which has the backend's name.

    Attributes:
        precisions: the one that is made unless another is named comes first.
        converter: the module that makes it of checkpoints; see `qrank.converters.makers.Maker`.
            "": nothing does.
        importer: the module that takes prebuilt files over, with `precision`, `import_file` and
            MODULES. "": nothing does.
        suffix: of prebuilt files.
        weights: a pattern of the files that hold a prebuilt file's weights, with `{name}` and
            `{stem}` for the file's name and that without its suffix. "": the file itself alone.
    """

    precisions: tuple[Precision, ...]
    converter: str = ""
    importer: str = ""
    suffix: str = ""
    weights: str = ""

    def precision(self, name: str) -> Precision | None:
        """The precision of a name; None if the format has none."""
        return next((precision for precision in self.precisions if precision.name == name), None)

    @property
    def made(self) -> list[str]:
        """Names of the precisions that checkpoints are converted to, the default first."""
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


@dataclass
class BackendSpec:
    """A backend. Making one imports no runtime; the functions may.

    Its name is that of its file in `qrank/backends`, or of the entry point.

    Attributes:
        open: loads a variant.
        version: the runtime's name and version.
        devices: the devices present, lower case.
        runtime: what people call the library it runs on; "" where that is the backend's name.
        kinds: every kind of device it might ever find.
        modules: that it imports. Another package says in its own metadata what it needs.
        extra: of qrank, which brings the modules.
        format: that it brings; None where it only runs formats of others.
        reads: formats of others that it runs.
        compute_dtypes: arithmetic that it can compute in on a device, fastest first; nothing where
            it leaves no choice.
        batches: values of `Options.max_batch_tokens` worth trying on a device, its own choice
            first.
        memory: bytes that a device other than the CPU has; None where it uses the machine's, where
            nothing tells, and where there is no such device.
        product: the matrix product, computed on a device: what `qrank doctor` checks.
        in_process: whether it may run on a device for the first time in the user's process. If not,
            a process of its own runs it first: it may crash or hang.
        note: what a user may want to know of a device that computes; "" mostly.
        conflict: what is wrong with how it is installed, and what to do; "" mostly.
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
    note: Callable[[str], str] = _silent
    conflict: Callable[[], str] = str

    def missing(self) -> str | None:
        """The first of its modules that is not installed; None if all are."""
        return next((module for module in self.modules if not installed(module)), None)

    def require(self) -> None:
        """See that its modules are installed.

        Raises:
            MissingExtraError: one is not.
        """
        if (module := self.missing()) is not None:
            need(module, extra=self.extra)

    @property
    def pip_line(self) -> str:
        """The command that installs what it needs; "" for another package's."""
        return pip_line(self.extra) if self.extra else ""
