"""A model's name -> a bundle to run: an unconverted checkpoint on the hub is converted first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qrank.bundle import converted
from qrank.bundle.hub_names import HubName, parse
from qrank.bundle.locate import find, unconverted
from qrank.bundle.opened import Bundle
from qrank.errors import InputError, MissingExtraError, TargetError
from qrank.select.targets import convertible, guesses
from qrank.system.extras import pip_line

log = logging.getLogger("qrank")


@dataclass(frozen=True)
class Wanted:
    """What to convert a checkpoint to.

    Attributes:
        backends: as for `qrank.select.targets.named`; there will be a variant for each.
        device: as for `qrank.select.targets.guesses`; where the variant is to run.
        family: a card's name or file, if the checkpoint does not identify itself.
    """

    backends: Sequence[str] = ()
    device: str | None = None
    family: str | None = None


def obtain(
    model: str | Path | Bundle,
    wanted: Wanted | None = None,
    *,
    revision: str | None = None,
    convert: bool = True,
    whole: bool = True,
    progress: Callable[[str], object] = log.info,
) -> Bundle:
    """Find a bundle as `qrank.bundle.locate` does, or make one from a checkpoint on the hub.

    Such a checkpoint is converted once, to one variant: the one expected to be fastest on this
    machine, among the formats whose packages are installed, or the next if that one is refused.
    The bundle is stored in the user's data folder (`qrank.bundle.converted`) for that revision, and
    used from then on without asking the hub. Warnings (logger "qrank") say that a conversion
    starts, what was made and where it is.

    Args:
        model: as for `locate`, or a checkpoint's hub id.
        wanted: what to convert a checkpoint to. What its bundle lacks is added to it.
        revision: branch, tag or commit on the hub, if `model` does not name it.
        convert: whether a checkpoint may be converted; if not, it is an error.
        whole: as for `locate`.
        progress: called with each step of a conversion.

    Raises:
        ModelNotFoundError: there is nothing of that name, or a checkpoint and `convert` is False.
        MissingExtraError: the packages to convert it are not installed.
        InputError: a family is wanted, and the bundle has another one.
        QrankError: it cannot be converted; nothing is stored then. See `qrank.errors`.
    """
    wanted = wanted or Wanted()
    found = find(model, revision)
    if isinstance(found, HubName) and not convert:
        raise unconverted(found)
    if isinstance(found, Bundle):
        _check_family(found, wanted.family)
    # Only what is named by a hub id is converted, not a folder that is named by its path.
    named = not isinstance(model, Bundle) and parse(str(model)) is not None
    ours = isinstance(found, HubName) or converted.name_of(found.folder) is not None
    if named and ours and convert:
        for backend in wanted.backends or (None,):
            if isinstance(found, HubName) or not _serves(found, backend, wanted.device):
                found = _converted(found, backend, wanted, progress)
    assert isinstance(found, Bundle)
    found.fetch(found.manifest.variants.values() if whole else ())
    return found


def _check_family(bundle: Bundle, family: str | None) -> None:
    own = bundle.manifest.family.name
    if family not in (None, own):
        raise InputError(
            f"family is {family!r}, and {bundle.manifest.name} is a bundle of family {own}: leave "
            "it out; it is for checkpoints (backend torch, and what is not converted yet)"
        )


def _serves(bundle: Bundle, backend: str | None, device: str | None) -> bool:
    """Whether a bundle has a variant for a backend and device."""
    try:
        return bool(guesses(bundle.manifest, backend, device))
    except TargetError:
        return False


def _converted(
    found: HubName | Bundle,
    backend: str | None,
    wanted: Wanted,
    progress: Callable[[str], object],
) -> Bundle:
    """Convert a checkpoint to one variant, or add one to the bundle that was made of it."""
    from qrank.converters.convert import convert
    from qrank.converters.makers import obstacle

    if isinstance(found, HubName):
        folder = converted.place_of(found)
        source, revision = found.repository, found.revision
    else:
        folder = found.folder
        # The branch may have moved on: a bundle is of one commit.
        source, revision = found.manifest.source.id, found.manifest.source.revision
    name = converted.name_of(folder)
    wishes = convertible(backend, wanted.device)
    obstacles = {format: obstacle(format) for format in dict.fromkeys(f for f, _ in wishes)}
    able = [wish for wish in wishes if not obstacles[wish[0]]]
    if not able:
        named = backend is not None and ":" not in backend
        raise MissingExtraError(
            f"{name} is a checkpoint, and packages are missing to convert it to "
            f"{' or '.join(obstacles)}; install them with: "
            f"{next(iter(obstacles.values())) if named else pip_line('convert')}"
        )
    converted.check_writable()
    log.warning("%s is a checkpoint: converting it to %s, once", name, "-".join(able[0]))
    start = time.monotonic()
    result = convert(
        source,
        able,
        folder,
        family=wanted.family,
        revision=revision,
        first=True,
        progress=progress,
    )
    for variant, reason in result.failed.items():
        log.warning("%s was not made: %s", variant, reason)
    if not result.manifest.probes.verified:
        log.warning("%s was converted by somebody else: self-consistent, not verified", name)
    made = [v for v in result.manifest.variants if v in {"-".join(wish) for wish in able}]
    seconds = time.monotonic() - start
    log.warning("made %s in %.0f s, in %s", ", ".join(made), seconds, result.folder)
    return Bundle(result.folder, result.manifest)
