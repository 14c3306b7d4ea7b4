"""What stands in front of the routes: keys, the size and pace of bodies, log lines, counters.

Plain ASGI, because bodies must be bounded before anything reads them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrank.errors import InputError
from qrank.serve.dialects import shape
from qrank.serve.metrics import Metrics
from qrank.serve.request import RefusedError
from qrank.textfiles import read_lines

access = logging.getLogger("qrank.serve.access")

OPEN = frozenset({"/health", "/ready"})
"""Paths that need no key: what starts and balances servers has none."""

HELD_BODIES = 8
"""Bodies of the largest size that may be held at a time; beyond, requests are refused."""

_IDENTITY = re.compile(r"[\w.:-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        documents: of one request.
        characters: of one text.
        body: bytes.
        body_seconds: for a body to come in.
        queue_tokens: that may wait for a model.
        seconds: for an answer, with the waiting.
    """

    documents: int = 2_000
    characters: int = 1_000_000
    body: int = 10_000_000
    body_seconds: float = 10.0
    queue_tokens: int = 500_000
    seconds: float = 60.0


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys of a file, one a line.

    Raises:
        InputError: it holds none.
    """
    keys = tuple(line.strip().encode() for line in read_lines(path) if line.strip())
    if not keys:
        raise InputError(f"{path} holds no key; write one a line")
    return keys


class Guard:
    """Wraps the application; answers by itself what does not get in."""

    def __init__(
        self, app: ASGIApp, *, keys: tuple[bytes, ...], limits: Limits, metrics: Metrics
    ) -> None:
        """Guard an application.

        Args:
            app: what is guarded.
            keys: any of which opens it; none: it is open.
            limits: of bodies.
            metrics: where to count.
        """
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._held = 0
        self.draining = False
        self.paths: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        said: dict[str, Any] = scope.setdefault("state", {})
        asked = headers.get("x-request-id", "")
        identity = asked if _IDENTITY.fullmatch(asked) else uuid.uuid4().hex
        status, told = 0, False

        def tell() -> None:
            """Count and log the request, once."""
            nonlocal told
            if told:
                return
            told = True
            seconds = time.perf_counter() - started
            # Whatever else is asked for must not make more and more counters.
            path = scope["path"] if scope["path"] in self.paths else "other"
            self._metrics.requests.labels(path, status or "none").inc()
            self._metrics.seconds.labels(path).observe(seconds)
            line = {
                "id": identity,
                "method": scope["method"],
                "path": path,
                "status": status or None,
                "ms": round(seconds * 1000, 1),
                **said.get("said", {}),
            }
            access.info("request", extra={"fields": line})

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = identity
                if self.draining:
                    out["connection"] = "close"
            elif not message.get("more_body", False):
                # Before its end: who has the answer finds it counted.
                tell()
            await send(message)

        held = 0
        try:
            self._check_key(scope["path"], headers)
            body, held = await self._body(headers, receive)
            await self._app(scope, _replay(body, receive), answer)
        except RefusedError as refusal:
            await refuse(scope["path"], refusal)(scope, receive, answer)
        finally:
            self._held -= held
            tell()

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in OPEN:
            return
        given = headers.get("authorization", "").partition(" ")[2].strip().encode()
        # All are compared, each in constant time: how long it takes tells nothing.
        right = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(right):
            raise RefusedError(401, "a key is needed: send the header Authorization: Bearer KEY")

    async def _body(self, headers: Headers, receive: Receive) -> tuple[bytes, int]:
        """The whole body, and what of it counts as held.

        What is too large is read to its end and let go, for the time a body has: a client that
        still sends would not see the answer.
        """
        limit, size, held = self._limits.body, 0, 0
        parts: list[bytes] = []
        length = headers.get("content-length", "")
        large = length.isdigit() and int(length) > limit
        too_large = RefusedError(
            413, f"the body is larger than {limit:,} bytes; send fewer documents at a time"
        )
        if large and headers.get("expect"):
            raise too_large  # it waits to be told
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError(400, "the client hung up before its body was there")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit or large:
                        parts.clear()
                    elif self._held + len(part) > limit * HELD_BODIES:
                        raise RefusedError(429, "too many large bodies at a time", retry_after=1)
                    else:
                        parts.append(part)
                        held += len(part)
                        self._held += len(part)
                    if not message.get("more_body"):
                        break
            if size > limit:
                raise too_large
        except BaseException as error:
            self._held -= held
            if isinstance(error, TimeoutError):
                raise (
                    too_large
                    if large or size > limit
                    else RefusedError(
                        408, f"the body did not come within {self._limits.body_seconds:g} s"
                    )
                ) from None
            raise
        return b"".join(parts), held


def refuse(path: str, refusal: RefusedError) -> JSONResponse:
    """An error as the path's dialect has it."""
    status, content = shape(path)(refusal.status, refusal.message)
    headers = {}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.status in (408, 413):
        headers["connection"] = "close"
    return JSONResponse(content, status, headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body first, then what the server still has to say."""
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
