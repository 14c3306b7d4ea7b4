"""PyInstaller's hook for qrank, which loads by name much that PyInstaller takes from imports.

It collects qrank's modules, the cards and the page of `qrank serve`; the runtimes of the backends
that are installed, and `mini` for these; and other packages' backends. torch and what else is only
for converting and evaluating stays out, unless the application imports it itself.
"""

# ruff: noqa: N999 (the name is PyInstaller's)
from importlib import metadata

from PyInstaller.utils.hooks import (
    collect_data_files,
    collect_dynamic_libs,
    collect_submodules,
    copy_metadata,
)

from qrank.backends import BACKENDS, entry_points, spec
from qrank.system.extras import EXTRA_OF, installed

_BUNDLES = [name for name in BACKENDS if name != "torch"]  # torch runs checkpoints
_RUNTIMES = [m for name in _BUNDLES for m in spec(name).modules if spec(name).missing() is None]
_IMPORTED = [module.partition(".")[0] for module in _RUNTIMES]
_CODECS = [name for name in ("brotli", "compression.zstd", "backports.zstd") if installed(name)]
_OTHERS = list(entry_points(()))

excludedimports = [
    module for module, extra in EXTRA_OF.items() if extra != "serve" and module not in _RUNTIMES
]
hiddenimports = [
    *collect_submodules("qrank", lambda name: not name.startswith("qrank.integrations")),
    *_RUNTIMES,
    *_CODECS,
    *(point.module for point in _OTHERS),
]
_ABSENT = [name for name in _BUNDLES if spec(name).missing() is not None]
datas = collect_data_files("qrank", excludes=[f"models/*/bundle/{name}-*" for name in _ABSENT])
# Versions of runtimes are in the keys of proofs; entry points name other packages' backends.
_FOUND = metadata.packages_distributions()
_PACKAGES = {name for package in _IMPORTED for name in _FOUND.get(package, ())}
_PACKAGES |= {point.dist.name for point in _OTHERS if point.dist}
for package in sorted(_PACKAGES):
    datas += copy_metadata(package)
binaries = [library for package in _IMPORTED for library in collect_dynamic_libs(package)]
if "mlx" in _IMPORTED:
    datas += collect_data_files("mlx", includes=["**/*.metallib"])  # Metal's kernels
if "openvino" in _RUNTIMES:
    # Loaded by name, which ends with a version on Linux: no dependency, and no lib*.so.
    binaries += collect_dynamic_libs("openvino", search_patterns=["libopenvino_ir_frontend.so.*"])
