"""A local hub server that answers the read requests of huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """Repositories, and the requests that were made.

    Attributes:
        commits: repository -> commit -> file name -> content.
        refs: repository -> branch or tag -> commit.
        refused: repository -> HTTP status and error code to refuse its files with.
        asked: paths of files that were downloaded, oldest first.
        ranges: the Range header of each of these requests; "" for a whole file.
        requests: number of requests of any kind.
        cuts: file name -> bytes after which its next download is cut off.
        url: address of the server.
    """

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    requests: int = 0
    cuts: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def push(self, repository: str, folder: Path, *names: str) -> str:
        """Commit a folder's files to main and the refs `names`; return the commit hash."""
        paths = [
            Path(place) / name
            for place, _, names in os.walk(folder, followlinks=True)
            for name in names
        ]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.refs.setdefault(repository, {}).update(dict.fromkeys(("main", *names), commit))
        return commit

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit hash of a branch, tag or commit hash; None if unknown."""
        known = self.refs.get(repository, {})
        return known.get(revision, revision if revision in self.commits[repository] else None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = urlsplit(self.path).path
        if found := API.fullmatch(path):
            self._api(found[1], found[2], unquote(found[3] or "main"))
        elif found := FILE.fullmatch(path):
            self._file(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, repository: str, kind: str | None, revision: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        files = self.hub.commits[repository][commit]
        if kind == "tree":
            self._json(
                [
                    {"type": "file", "path": n, "size": len(data), "oid": _etag(data)}
                    for n, data in files.items()
                ]
            )
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, repository: str, revision: str, name: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        if repository in self.hub.refused:
            return self._refuse(*self.hub.refused[repository])
        data = self.hub.commits[repository][commit].get(name)
        if data is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._answer(200, data, {**headers, "X-Linked-Size": str(len(data))})
        asked = self.headers.get("Range", "")
        self.hub.asked.append(name)
        self.hub.ranges.append(asked)
        cut = self.hub.cuts.pop(name, None)
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206, data[start:], headers, cut)
        else:
            self._answer(200, data, headers, cut)

    def _commit(self, repository: str, revision: str) -> str | None:
        if repository not in self.hub.commits:
            self._refuse(401, "RepoNotFound")
            return None
        commit = self.hub.commit(repository, revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
        return commit

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: tests read `Hub.asked` instead."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, which reads the variable only once, to another hub."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.list_repo_files", huggingface_hub.HfApi().list_repo_files)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub server until the context exits."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
