"""Files from the Hugging Face hub, with huggingface_hub's cache, token and offline conventions."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path

from qrank.bundle.hub_names import endpoint
from qrank.errors import ModelNotFoundError
from qrank.system import disk


def download(
    repository: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
    bars: bool = True,
) -> Path:
    """Download some files of a repository, or find them in the cache.

    Args:
        repository: `owner/name`.
        files: names or patterns; one that matches nothing is not an error.
        revision: branch, tag or commit; None for the main branch.
        offline: use only what is on disk.
        cache: huggingface_hub's cache folder; None for its default.
        bars: draw progress bars if stderr is a terminal.

    Returns:
        A folder named after the commit.

    Raises:
        ModelNotFoundError: no such repository or revision, no access, no network, or no space.
    """
    # Importing it takes 0.2 s, and most models are already on disk.
    import huggingface_hub as hub

    with _bars(bars and not offline), _explained(repository, revision, offline):
        return Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=offline,
                cache_dir=cache,
            )
        )


def listing(repository: str, revision: str) -> list[str]:
    """Names of all files of a repository at a commit.

    Raises:
        ModelNotFoundError: the hub cannot be asked, or has no such repository or commit.
    """
    import huggingface_hub as hub

    with _explained(repository, revision, offline=False):
        return hub.list_repo_files(repository, revision=revision)


_AROUND_BARS: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar(
    "around_bars", default=nullcontext
)


@contextmanager
def stepping_aside(pause: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Lets other terminal output pause while the hub draws progress bars.

    Args:
        pause: makes a context that is entered while bars are drawn.
    """
    token = _AROUND_BARS.set(pause)
    try:
        yield
    finally:
        _AROUND_BARS.reset(token)


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Shows huggingface_hub's progress bars on a terminal only, and pauses other drawing there."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if wanted and sys.stderr is not None and sys.stderr.isatty():
        with _AROUND_BARS.get()():
            try:
                yield
            finally:
                # The hub leaves open bars in reference cycles: they would be drawn again later.
                gc.collect()
        return
    # The user's environment variable takes precedence; the hub warns if we contradict it.
    named = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    if named or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(repository: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Turns any exception from the hub into an error that says what to do."""
    try:
        yield
    # OSError, ValueError, and those of httpx or (before 1.0) requests: they share no base class.
    except Exception as error:
        reason = _reason(error, repository, revision, offline)
        raise ModelNotFoundError(f"{repository} is no folder here, and {reason}") from error


def _reason(error: Exception, repository: str, revision: str | None, offline: bool) -> str:
    """Why the hub did not deliver something, and what to do about it."""
    from huggingface_hub import constants, errors

    causes = list(disk.chain(error))

    def found(kind: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    page = f"{endpoint()}/{repository}"
    if full := disk.reported(error, Path(constants.HF_HUB_CACHE)):
        return f"it cannot be stored: {full}. HF_HOME names another folder for the hub's files"
    if found(errors.GatedRepoError):
        return (
            f"the hub gives it to those who accepted its licence: do so at {page}, then log in "
            "with `hf auth login`, or set HF_TOKEN"
        )
    if found(errors.DisabledRepoError):
        return f"the hub has disabled it: see {page}"
    if found(errors.RevisionNotFoundError):
        return (
            f"the repository has no revision {revision or 'main'}: {page}/tree/main shows its "
            "branches and tags"
        )
    if found(errors.RepositoryNotFoundError):
        return (
            f"the hub has none of that name, or a private one: look at {page}. For a private one "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    if offline or found(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        how = "--offline" if offline else "HF_HUB_OFFLINE"
        return (
            f"it was not downloaded before{_at(revision)}: {how} keeps qrank from asking the hub. "
            "Leave that out once"
        )
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return f"the hub answered {status}: {_line(cause)}{_HELP.get(status, '')}"
    if isinstance(error, errors.HFValidationError):
        return f"the hub has no such names: {_line(error)}"
    if found(_unreachable()):
        return (
            f"{endpoint()} cannot be reached ({_line(causes[-1])}): see to the network or the "
            "proxy (HTTPS_PROXY), or name a mirror by HF_ENDPOINT"
        )
    return f"the hub did not give it: {_line(error)}"


_HELP = {
    401: "; log in anew with `hf auth login`, or set HF_TOKEN",
    403: "; see whether your token may read it (`hf auth login`, HF_TOKEN)",
    429: "; wait a little, or log in with `hf auth login`",
}
"""HTTP status -> what to do."""


def _unreachable() -> tuple[type[BaseException], ...]:
    """The classes of network errors."""
    kinds: list[type[BaseException]] = [ConnectionError, TimeoutError]
    for module, name in (("httpx", "TransportError"), ("requests", "ConnectionError")):
        if (loaded := sys.modules.get(module)) is not None:
            kinds.append(getattr(loaded, name))
    return tuple(kinds)


def _line(error: BaseException) -> str:
    """An error's first line, or its class if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision}"
