"""Check every target of a bundle on this machine, for `qrank doctor --report FILE`.

The report is made to be sent to somebody else, by whoever has hardware that we lack. It holds no
name of a user or a host, no folder, no environment variable and no text.
"""

from __future__ import annotations

import getpass
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from qrank.backends import BACKENDS, isolation, kind, spec, tolerance
from qrank.bundle.fidelity import here
from qrank.bundle.opened import Bundle
from qrank.errors import QrankError
from qrank.measure.candidates import Candidate, candidates
from qrank.measure.discover import Found, surveys
from qrank.measure.doctor import LIMIT, examine
from qrank.measure.tournament import Tournament
from qrank.measure.tuning import tune
from qrank.select.measurements import Measurement, recalled
from qrank.select.targets import Target
from qrank.select.verify import CONVERTED_IN
from qrank.system import machine
from qrank.system.steps import Step
from qrank.system.version import __version__

SCHEMA = 1
"""Of the report; it changes when a field is renamed or removed."""

PATIENCE = 300.0
"""Seconds that a target may at least take to open, and to compute the probes. A slow board is not
a hang, and nobody waits for a report."""

NO_DEVICE = "no such device"
"""Reason of a target whose runtime is here, but not its device."""

_SHARED = ("numpy", "tokenizers")
"""Packages that every target needs."""


@dataclass(frozen=True)
class TargetReport:
    """What a target did with the bundle's probes on this machine.

    Attributes:
        target: `onnx-int8@cpu`; without a device if its backend cannot be used.
        result: `conforms`; `fails`: it is here and cannot be used; `absent`: its runtime or its
            device is not here.
        reason: why it fails or is absent.
        compute_dtype: data type it computes in; None if there is no choice.
        runtime: version of what runs it.
        max_abs: largest absolute difference of a logit from the original's, over all probes.
        allowed: the largest that conforms.
        kendall: Kendall's tau of its logits and the original's.
        load: seconds to open it.
        speeds: pairs per second, by profile of `qrank tune`; {} if not measured.
    """

    target: str
    result: Literal["conforms", "fails", "absent"]
    reason: str | None = None
    compute_dtype: str | None = None
    runtime: str | None = None
    max_abs: float | None = None
    allowed: float | None = None
    kendall: float | None = None
    load: float | None = None
    speeds: dict[str, float] = field(default_factory=dict)


def report(
    bundle: Bundle,
    *,
    tuned: bool = False,
    progress: Callable[[str], object] = lambda step: None,
) -> dict[str, Any]:
    """Check every target of a bundle here, each in its own process.

    Unlike at a target's first use, all probes are computed, in every compute dtype.

    Args:
        bundle: whose targets.
        tuned: measure their speeds first, as `qrank tune` does, and store them.
        progress: called with what is being done.

    Returns:
        JSON values: `schema`, `qrank`, `date`, `machine`, `packages`, `backends` (see `examine`),
        `model`, and `targets` with the fields of `TargetReport`.
    """
    manifest, threads = bundle.manifest, machine.processors()
    measured = tune(bundle, progress=progress) if tuned else recalled(manifest, threads)
    examined = examine(progress)
    found = surveys(manifest, LIMIT, progress)
    tried = list(candidates(manifest, found, threads))
    targets = []
    for done, candidate in enumerate(tried):
        progress(Step(f"checking {candidate.name}", done, len(tried)))
        targets.append(_checked(bundle, candidate, found, measured))
    targets += _absent(bundle, found)
    modules = [module for name in BACKENDS for module in spec(name).modules]
    content = {
        "schema": SCHEMA,
        "qrank": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            **examined["machine"],
            "libc": " ".join(platform.libc_ver()).strip(),
            "python": platform.python_version(),
        },
        "packages": machine.packages((*_SHARED, *dict.fromkeys(modules))),
        "backends": examined["backends"],
        "model": {
            "name": manifest.name,
            "digest": manifest.digest,
            "probes": len(manifest.probes.work),
        },
        "targets": [asdict(target) for target in targets],
    }
    impersonal: dict[str, Any] = _impersonal(content, _names(), _folders(bundle))
    return impersonal


def _checked(
    bundle: Bundle, candidate: Candidate, found: Iterable[Found], measured: Iterable[Measurement]
) -> TargetReport:
    target, compute_dtype = candidate.target, candidate.compute_dtype
    about: dict[str, Any] = {
        "target": target.name,
        "compute_dtype": compute_dtype,
        "runtime": next(each.version for each in found if each.backend == target.backend),
    }
    tokens = int(bundle.manifest.probes.work.lengths.sum())
    limit = max(
        isolation.limit(target.backend, target.variant.bytes, tokens, target.device), PATIENCE
    )
    contest = Tournament(bundle.folder, {}, limit)
    try:
        with contest.opened(candidate) as opened:
            load = opened.load
            fidelity = contest.fidelity(opened)
    except QrankError as error:
        return TargetReport(result="fails", reason=str(error), **about)
    own = tolerance(target.variant.format, target.variant.precision)
    bar = own if compute_dtype in (None, CONVERTED_IN) else here(own, exact=False)
    missed = bar.shortfall(fidelity)
    return TargetReport(
        result="fails" if missed else "conforms",
        reason=missed,
        max_abs=fidelity.max_abs if math.isfinite(fidelity.max_abs) else None,
        allowed=bar.share * max(1.0, fidelity.spread),
        kendall=fidelity.kendall if math.isfinite(fidelity.kendall) else None,
        load=load,
        speeds=_speeds(candidate, measured),
        **about,
    )


def _speeds(candidate: Candidate, measured: Iterable[Measurement]) -> dict[str, float]:
    """Speeds of a target with its backend's default batches; {} if they were not measured."""
    for m in measured:
        same = (m.target, m.compute_dtype) == (candidate.target.key, candidate.compute_dtype)
        if same and m.max_batch_tokens is None and m.threads == candidate.threads:
            return m.speeds
    return {}


def _absent(bundle: Bundle, found: Sequence[Found]) -> Iterator[TargetReport]:
    """Targets whose runtime or device is not here."""
    variants = bundle.manifest.variants.values()
    for each in found:
        if each.reason is not None:
            names = [v.name for v in variants if v.format == each.backend] or [each.backend]
            for name in names:
                yield TargetReport(name, "absent", each.reason)
        present = {kind(device.name) for device in each.devices}
        for absent in [name for name in each.kinds if name not in present]:
            for variant in variants:
                if variant.format in each.formats:
                    name = Target(variant, absent, each.backend).name
                    yield TargetReport(name, "absent", NO_DEVICE, runtime=each.version)
    known = {name for each in found for name in (*each.formats, each.backend)}
    for variant in variants:
        if variant.format not in known:
            yield TargetReport(variant.name, "absent", f"no backend here reads {variant.format}")


_PATH = re.compile(r"(?<![\w./])(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\"<>|:;,()]+)+(?=[\\/])")
"""The folders of an absolute path."""


def _folders(bundle: Bundle) -> list[str]:
    """Folders of this user that errors may name, the longest first: they may contain spaces."""
    places = [bundle.folder, bundle.folder.resolve(), Path.cwd(), tempfile.gettempdir()]
    places += [sys.prefix, sys.base_prefix, *filter(None, sys.path)]
    with suppress(RuntimeError):  # nobody's home is known
        places.append(Path.home())
    found = {str(place) for place in places} - {os.sep, "."}
    return sorted(found, key=len, reverse=True)


def _names() -> list[str]:
    """Names of this user and this host."""
    names = [platform.node(), platform.node().partition(".")[0]]
    with suppress(OSError, KeyError, ImportError):  # a user without a name
        names.append(getpass.getuser())
    with suppress(RuntimeError):
        names.append(Path.home().name)
    # These tell nothing, and are words of messages.
    return sorted({*names} - {"", "root", "user", "qrank", "localhost"}, key=len, reverse=True)


def _impersonal(value: Any, names: Sequence[str], folders: Sequence[str]) -> Any:
    """JSON values without the names and folders of this user in their texts."""
    if isinstance(value, dict):
        return {key: _impersonal(each, names, folders) for key, each in value.items()}
    if isinstance(value, list):
        return [_impersonal(each, names, folders) for each in value]
    if not isinstance(value, str):
        return value
    for folder in folders:
        value = value.replace(folder, "...")
    value = _PATH.sub("...", value)
    for name in names:
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", value)
    return value
