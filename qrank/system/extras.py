"""Import optional packages, or say how to install them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import cast

from qrank.errors import MissingExtraError

EXTRA_OF = {
    "bm25s": "eval",
    "fastapi": "serve",
    "gguf": "convert",
    "ir_measures": "eval",
    "matplotlib": "plot",
    "nncf": "optimum",
    "onnx": "convert",
    "onnxscript": "convert",
    "openvino": "convert",
    "optimum": "optimum",
    "pyarrow": "parquet",
    "prometheus_client": "serve",
    "ray": "ray",
    "safetensors": "convert",
    "scipy": "eval",
    "sentencepiece": "convert",
    "torch": "convert",
    "transformers": "convert",
    "uvicorn": "serve",
}
"""Module -> the extra of qrank that installs it. A backend's runtime is in its `BackendSpec`."""

_SILENCE = {"onnxruntime": "ORT_DISABLE_TELEMETRY"}
"""Module -> environment variable that disables its telemetry if set before the import.

onnxruntime has had telemetry since 1.29; its thread makes a forked child hang on exit."""

_TELEMETRY = "openvino_telemetry"
"""Package that sends telemetry for openvino and nncf, from the import on and without asking; it
also writes to the home folder. Neither has a switch for it, and both work without the package."""


def pip_line(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "qrank[{extra}]"'


def find(module: str) -> ModuleSpec | None:
    """Where a module is, without importing it; its package may be imported. None: not installed."""
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    # find_spec imports a module's package, which must be there.
    return found if found is None or module == package else importlib.util.find_spec(module)


def installed(module: str) -> bool:
    """Whether a module can be found; see `find`."""
    return find(module) is not None


def need(module: str, *, extra: str | None = None) -> ModuleType:
    """Import an optional module.

    Args:
        module: its name.
        extra: the extra that installs it for the current task; None: the one in EXTRA_OF.

    Raises:
        MissingExtraError: it is not installed, or is broken; the message has the pip line.
    """
    package = module.partition(".")[0]
    extra = extra or EXTRA_OF[package]
    if package in _SILENCE:
        os.environ.setdefault(_SILENCE[package], "1")
    if package in ("openvino", "nncf"):
        # None in sys.modules makes an import fail as if the module were not installed.
        sys.modules.setdefault(_TELEMETRY, cast(ModuleType, None))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        state = "cannot be imported" if installed(package) else "is not installed"
        raise MissingExtraError(
            f"{module} {state} ({error}); install it with: {pip_line(extra)}"
        ) from error
