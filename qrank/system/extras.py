"""Optional packages: import one, or say how to install it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import cast

from qrank.errors import MissingExtraError

EXTRA_OF = {
    "bm25s": "eval",
    "fastapi": "serve",
    "gguf": "convert",
    "ir_measures": "eval",
    "matplotlib": "plot",
    "nncf": "convert",
    "onnx": "convert",
    "onnxscript": "convert",
    "openvino": "convert",
    "prometheus_client": "serve",
    "safetensors": "convert",
    "scipy": "eval",
    "torch": "convert",
    "transformers": "convert",
    "uvicorn": "serve",
}
"""Which extra of qrank brings a module. What a backend runs on is said in its `BackendSpec`."""

_SILENCE = {"onnxruntime": "ORT_DISABLE_TELEMETRY"}
"""The environment variable that, set before the import, keeps a module from calling home.

onnxruntime does since 1.29, from a thread that makes a forked child hang when it exits."""

_TELEMETRY = "openvino_telemetry"
"""The package openvino and nncf call home with, from the import on and without asking; it also
writes to the home folder. Neither has a switch, and both do without it where it is absent."""


def pip_line(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "qrank[{extra}]"'


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def need(module: str, *, extra: str | None = None) -> ModuleType:
    """Import an optional module.

    Args:
        module: its name.
        extra: which brings it for the task at hand; None: the one in EXTRA_OF.

    Raises:
        MissingExtraError: it is not installed, or is installed and broken; with the pip line.
    """
    package = module.partition(".")[0]
    extra = extra or EXTRA_OF[package]
    if package in _SILENCE:
        os.environ.setdefault(_SILENCE[package], "1")
    if package in ("openvino", "nncf"):
        # The import system's own way to say that a module is not there.
        sys.modules.setdefault(_TELEMETRY, cast(ModuleType, None))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        state = "cannot be imported" if installed(package) else "is not installed"
        raise MissingExtraError(
            f"{module} {state} ({error}); install it with: {pip_line(extra)}"
        ) from error
