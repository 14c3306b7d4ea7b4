"""Hugging Face hub names and addresses, and the repository behind a folder of the hub's cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qrank.errors import InputError, ModelNotFoundError

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")

_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
"""The form of an owner and of a name."""

_VIEWS = ("tree", "blob", "resolve", "raw", "commit")
"""Path parts that come before a revision in the hub's addresses."""

_OTHERS = {"datasets": "a dataset", "spaces": "a space", "buckets": "a bucket"}

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A name or an address on the hub, parsed.

    Attributes:
        repository: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
        path: of a file or folder in the repository; "" for the whole repository.
    """

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        """`owner/name`, or `owner/name@revision`, as `parse` takes it."""
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{at}{self.path and f'/{self.path}'}"

    def at(self, revision: str | None) -> HubName:
        """The same name at a separately given revision; None keeps its own.

        Raises:
            InputError: both have a revision, and they differ.
        """
        if None not in (revision, self.revision) and revision != self.revision:
            raise InputError(
                f"{self.repository} is named with revision {self.revision} and with {revision}: "
                "name one"
            )
        return replace(self, revision=revision or self.revision)


def parse(text: str) -> HubName | None:
    """Parse a hub name or address; None if the text does not have the form of one.

    Accepts `owner/name`, `owner/name@revision`, `owner/name/FILE`, `owner/name/tree/main`, and the
    addresses that browsers, git and huggingface_hub (`hf://`) use for these.

    Raises:
        ModelNotFoundError: the address is not a model's: a data set, another site.
    """
    address, rest = True, text
    if text.startswith("hf://"):
        rest = text.removeprefix("hf://")
    elif text.startswith(("git@hf.co:", "git@huggingface.co:")):
        rest = text.partition(":")[2]
    elif "://" in text:
        url = urlsplit(text)
        if url.hostname not in (*HOSTS, urlsplit(endpoint()).hostname):
            raise ModelNotFoundError(
                f"{text} is an address of {url.hostname or url.scheme}; of addresses, qrank takes "
                f"those of the hub ({endpoint()}/owner/name)"
            )
        rest = url.path
    elif text.partition("/")[0] in HOSTS:
        rest = re.split(r"[?#]", text.partition("/")[2])[0]
    else:
        address = False
    parts = rest.strip("/" if address else "").rstrip("/").split("/")
    if address:
        parts = [unquote(part) for part in parts if part]
        if parts[:1] == ["models"] and len(parts) > 2:
            del parts[0]
        if parts and parts[0] in _OTHERS:
            raise ModelNotFoundError(f"{text} is {_OTHERS[parts[0]]}, and no model")
    if len(parts) < 2:
        return None
    owner, (name, _, revision), path = parts[0], parts[1].partition("@"), parts[2:]
    name = name.removesuffix(".git")
    if not (_PART.fullmatch(owner) and _PART.fullmatch(name)):
        return None
    if path and path[0] in _VIEWS and len(path) > 1 and not revision:
        # A pull request's revision: refs/pr/1.
        end = 4 if path[1] == "refs" else 2
        revision, path = "/".join(path[1:end]), path[end:]
    return HubName(f"{owner}/{name}", revision or None, "/".join(path))


@dataclass(frozen=True)
class Snapshot:
    """The repository and commit that a folder in huggingface_hub's cache holds."""

    repository: str
    commit: str
    cache: Path


def snapshot(folder: Path) -> Snapshot | None:
    """The hub snapshot in a folder, recognized by its path; None for any other folder.

    The path ends in `models--owner--name/snapshots/COMMIT`; see
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    folder = folder.resolve()
    home = folder.parent.parent
    kind, *names = home.name.split("--")
    if kind != "models" or not names or folder.parent.name != "snapshots":
        return None
    if not _COMMIT.fullmatch(folder.name):
        return None
    return Snapshot("/".join(names), folder.name, home.parent)


def newest_snapshot(folder: Path) -> Path | None:
    """The main branch's snapshot, or the only one, in a repository's cache folder; else None."""
    reference, snapshots = folder / "refs" / "main", folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return None
    if reference.is_file():
        main = snapshots / reference.read_text("utf-8").strip()
        return main if main.is_dir() else None
    found = list(snapshots.iterdir())
    return found[0] if len(found) == 1 else None


def endpoint() -> str:
    """The hub's URL."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
