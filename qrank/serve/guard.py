"""ASGI middleware in front of the routes: keys, limits of bodies, aliases of paths, access log.

Plain ASGI, because bodies must be limited before the framework reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qrank.serve.access import Access
from qrank.serve.body import Bodies, plain_headers, replay
from qrank.serve.dialect import Dialects
from qrank.serve.errors import refuse
from qrank.serve.keys import check_key
from qrank.serve.metrics import Metrics
from qrank.serve.request import Limits, RequestError
from qrank.serve.routing import routed

_NAME = re.compile("[A-Za-z0-9_.-]{1,64}")
"""A field's name that fits into a header."""


class Guard:
    """Wraps the application, and answers requests that it refuses.

    Attributes:
        draining: the server is stopping; answers close their connection.
        failed: a bug has ended a queue.
        on_failure: called when that happens.
        routes: paths of the application.
    """

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
        """Wrap an application.

        Args:
            app: the application.
            keys: a request must send one of them; no keys: every request is allowed.
            limits: of bodies.
            metrics: count the requests.
            dialects: determine the shape of errors.
            root: the path under which a proxy serves the application, as `/rank`.
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
        """Mark the server as failed: a bug has ended a queue."""
        self.failed = True
        self.on_failure()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method = scope["method"]
        browser = "text/html" in headers.get("accept", "")
        route = routed(scope["path"], method, self._root, browser=browser)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["path"] = route
        state["error_shape"] = self._dialects.error(route)
        path = route if route in self.routes else "other"
        access = Access(method, path, headers.get("x-request-id", ""), state, self._metrics)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                access.status = message["status"]
                self._add_headers(MutableHeaders(scope=message), access, state)
            else:
                if not message.get("more_body", False):
                    # Before the last part: once the client has the answer, it is counted.
                    access.end()
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
            check_key(self._keys, route, headers)
            async with self._bodies.read(headers, receive) as body:
                inner["headers"] = plain_headers(scope["headers"], len(body))
                await self._app(inner, replay(body, receive), answer)
        except RequestError as refusal:
            await refuse(state["error_shape"], refusal)(scope, receive, answer)
        finally:
            access.end()

    def _add_headers(self, out: MutableHeaders, access: Access, state: dict[str, Any]) -> None:
        """Add the headers that answers of all dialects have."""
        out["x-request-id"] = access.identity
        said = state.get("said", {})
        if model := said.get("model"):
            # Not every dialect has a field for the model.
            out["x-qrank-model"] = quote(model, safe="/:@+=,")
        if "cached" in said:
            out["x-qrank-cached"] = str(said["cached"])
        if names := [name for name in state.get("ignored", ()) if _NAME.fullmatch(name)]:
            out["x-qrank-ignored"] = ", ".join(names[:20])
        if self.draining:
            out["connection"] = "close"
