"""What stands in front of the routes: keys, bounded bodies, other paths, log lines, counters.

Plain ASGI, because bodies must be bounded before anything reads them.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrank.errors import InputError
from qrank.serve.body import Bodies
from qrank.serve.dialect import Dialects
from qrank.serve.errors import refuse
from qrank.serve.metrics import Metrics
from qrank.serve.request import Limits, RequestError
from qrank.serve.routing import routed
from qrank.system.textfiles import read_lines

access = logging.getLogger("qrank.serve.access")

OPEN = frozenset({"/health", "/ready"})
"""Routes that need no key: what starts and balances servers has none."""

_IDENTITY = re.compile(r"[\w.:-]{1,64}", re.ASCII)


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
        self,
        app: ASGIApp,
        *,
        keys: tuple[bytes, ...],
        limits: Limits,
        metrics: Metrics,
        dialects: Dialects,
        root: str = "",
    ) -> None:
        """Guard an application.

        Args:
            app: what is guarded.
            keys: any of which opens it; none: it is open.
            limits: of bodies.
            metrics: where to count.
            dialects: whose shapes its errors have.
            root: the prefix under which a proxy offers it, as `/rank`.
        """
        self._app = app
        self._keys = keys
        self._bodies = Bodies(limits)
        self._metrics = metrics
        self._dialects = dialects
        self._root = root
        self.draining = False
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None
        self.routes: frozenset[str] = frozenset()

    def fail(self) -> None:
        """Send no requests here any more: a bug of ours has ended what answers them."""
        self.failed = True
        self.on_failure()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        method = scope["method"]
        route = routed(scope["path"], method, self._root)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["path"] = route
        state["error_shape"] = self._dialects.error(route)
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
            path = route if route in self.routes else "other"
            self._metrics.requests.labels(path, status or "none").inc()
            self._metrics.seconds.labels(path).observe(seconds)
            line = {
                "id": identity,
                "method": method,
                "path": path,
                "status": status or None,
                "ms": round(seconds * 1000, 1),
                **state.get("said", {}),
            }
            access.info("request", extra={"fields": line})

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = identity
                if model := state.get("said", {}).get("model"):
                    # Not every dialect's answer has a place for it.
                    out["x-qrank-model"] = quote(model, safe="/:@+=,")
                if self.draining:
                    out["connection"] = "close"
            else:
                if not message.get("more_body", False):
                    # Before its end: who has the answer finds it counted.
                    tell()
                if method == "HEAD":
                    message = {**message, "body": b""}
            await send(message)

        inner = {
            **scope,
            "method": "GET" if method == "HEAD" else method,
            "path": self._root + route,
            "raw_path": quote(self._root + route).encode(),
            "root_path": self._root,
        }
        try:
            self._check_key(route, headers)
            async with self._bodies.read(headers, receive) as body:
                inner["headers"] = _plain(scope["headers"], len(body))
                await self._app(inner, _replay(body, receive), answer)
        except RequestError as refusal:
            await refuse(state["error_shape"], refusal)(scope, receive, answer)
        finally:
            tell()

    def _check_key(self, route: str, headers: Headers) -> None:
        if not self._keys or route in OPEN:
            return
        given = headers.get("authorization", "").partition(" ")[2].strip().encode()
        # All are compared, each in constant time: how long it takes tells nothing.
        right = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(right):
            raise RequestError(401, "a key is needed: send the header Authorization: Bearer KEY")


def _plain(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """The headers of a request whose body is there, so long and not compressed any more."""
    body = (b"content-encoding", b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name not in body]
    return [*kept, (b"content-length", str(length).encode())]


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
