"""The Hugging Face hub, by huggingface_hub's own cache, token and offline conventions."""

from __future__ import annotations

from pathlib import Path

from qrank.errors import ModelNotFoundError


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name`."""
    owner, slash, repository = name.partition("/")
    return bool(slash and owner.strip(".~") and repository and "/" not in repository)


def download(
    repository: str, files: list[str], *, revision: str | None = None, offline: bool = False
) -> Path:
    """Fetch some files of a repository, or find them where they were fetched before.

    Args:
        repository: `owner/name`.
        files: names or patterns; what matches nothing is not an error.
        revision: branch, tag or commit; None for the main branch.
        offline: look at what is on disk only.

    Returns:
        A folder named after the commit.

    Raises:
        ModelNotFoundError: no such repository or revision, no access, or no network.
    """
    # Takes a fifth of a second, and most models are on disk.
    import huggingface_hub as hub

    try:
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=files, local_files_only=offline
            )
        )
    # The hub's errors are OSErrors, but for a malformed id's.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"{repository} is no folder here, and the hub did not give it: {reason}"
        ) from error


def listing(repository: str, revision: str) -> list[str]:
    """Names of all files of a repository at a commit.

    Raises:
        ModelNotFoundError: the hub does not say.
    """
    import huggingface_hub as hub

    try:
        return hub.list_repo_files(repository, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"the hub does not say what {repository} holds: {reason}. Name the file, as in "
            f"{repository}/onnx/model.onnx, or say --offline"
        ) from error
