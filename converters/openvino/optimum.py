"""A checkpoint -> an OpenVINO graph by optimum-intel, imported like any prebuilt one.

This is `qrank convert --exporter optimum`. optimum-intel quantizes the score head like every other
matrix; the import then stores an encoder's row in fp32, with the values of 8 bits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.configuration import is_causal, read_config
from qrank.converters.checkpoint.json_files import explained
from qrank.converters.checkpoint.logs import errors_only
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.openvino.prebuilt import import_file, precision
from qrank.converters.prebuilt import refuse_windows
from qrank.errors import ConversionError
from qrank.system.extras import need

MODULES = ("torch", "transformers", "safetensors", "openvino", "nncf", "optimum.intel")
"""Modules needed to convert and verify."""

MEMORY = 1.0
"""It holds the whole model in fp32."""


def convert(checkpoint: Checkpoint, asked: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.xml` and `model.bin` into a folder.

    Args:
        checkpoint: exported from its files.
        asked: the precision, `int8` (of weights) or `fp16`.
        folder: exists and is empty.
        calibration: not used; neither precision quantizes activations.

    Returns:
        A note that names optimum-intel and its version.

    Raises:
        ConversionError: optimum-intel cannot export the checkpoint, or not as this precision.
    """
    if asked not in ("int8", "fp16"):
        raise ConversionError(
            f"--exporter optimum makes int8 and fp16; for {asked}, leave --exporter out"
        )
    if checkpoint.read_as:
        raise ConversionError(
            f"optimum-intel reads a checkpoint's files as they are, and {checkpoint.read_as}: "
            "leave --exporter out"
        )
    refuse_windows(checkpoint, "optimum-intel's graph")
    ov = need("openvino")
    need("nncf")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        path = Path(temporary) / "openvino_model.xml"
        version = _export(checkpoint, asked, path.parent)
        if asked == "fp16":
            graph = ov.Core().read_model(path)
            path = path.with_name("fp16.xml")
            ov.save_model(graph, path, compress_to_fp16=True)
        if (found := precision(path)) != asked:
            raise ConversionError(f"optimum-intel {version} wrote {found} instead of {asked}")
        note = import_file(path, checkpoint, folder)
    return f"exported by optimum-intel {version}" + (f"; {note}" if note else "")


def _export(checkpoint: Checkpoint, asked: str, folder: Path) -> str:
    """Write optimum-intel's graph, `openvino_model.xml`, into a folder; return its version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intel = need("optimum.intel")
    # Its import sets its log level.
    with _silence():
        bits = intel.OVWeightQuantizationConfig(bits=8, sym=False)
        causal = is_causal(read_config(checkpoint.folder))
        kind = intel.OVModelForCausalLM if causal else intel.OVModelForSequenceClassification
        with explained(f"optimum-intel cannot export {checkpoint.name}; leave --exporter out"):
            model = kind.from_pretrained(
                str(checkpoint.folder),
                export=True,
                compile=False,
                quantization_config=bits if asked == "int8" else None,
                # With None, models of a billion parameters and more would be quantized.
                load_in_8bit=None if asked == "int8" else False,
                local_files_only=True,
                trust_remote_code=False,
            )
            model.save_pretrained(folder)
        version: str = need("optimum.intel.version").__version__
    return version


@contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings, logs and progress of all that takes part; NNCF's are on stdout."""
    with ExitStack() as stack:
        for name in ("nncf", "optimum", "transformers"):
            stack.enter_context(errors_only(name))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
