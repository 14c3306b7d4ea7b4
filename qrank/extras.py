"""Optional packages: import one, or say how to install it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from qrank.errors import MissingExtraError

EXTRA_OF = {
    "huggingface_hub": "hub",
    "onnx": "convert",
    "onnxruntime": "onnx",
    "onnxscript": "convert",
    "safetensors": "convert",
    "torch": "convert",
    "transformers": "convert",
}
"""Which extra of qrank brings a module."""


def pip_line(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "qrank[{extra}]"'


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def need(module: str) -> ModuleType:
    """Import an optional module.

    Raises:
        MissingExtraError: it is not installed, or is installed and broken; with the pip line.
    """
    extra = EXTRA_OF[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        state = "cannot be imported" if installed(module.partition(".")[0]) else "is not installed"
        raise MissingExtraError(
            f"{module} {state} ({error}); install it with: {pip_line(extra)}"
        ) from error
