"""The process: sockets, signals, draining, log lines."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qrank.errors import QrankError
from qrank.serve.guard import Guard

HEAD_SECONDS = 10.0
"""For a request's head to come in, from its first byte or the connection's beginning."""

KEEP_ALIVE_SECONDS = 75
"""An idle connection is kept: longer than most clients keep theirs, so that they end it."""

GRACE_SECONDS = 1.0
"""After SIGTERM, for requests that are on their way over connections there are."""


class JsonLines(logging.Formatter):
    """A log record as one line of JSON; `extra={"fields": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content)


class Protocol(H11Protocol):
    """HTTP/1.1 with a limit to the time a request's head takes, which uvicorn does not have."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        # asyncio does so for sockets that name their protocol, which Python's own listening ones do
        # not. Without, an answer's body waits 40 ms for the client to acknowledge its head.
        connection = transport.get_extra_info("socket")
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Uvicorn's, which on SIGTERM answers what it has accepted before it goes."""

    def __init__(self, config: uvicorn.Config, guard: Guard, ready: Callable[[], None]) -> None:
        """Serve.

        Args:
            config: uvicorn's.
            guard: is told when draining begins, and tells when it has failed: then this ends.
            ready: called when requests are taken.
        """
        super().__init__(config)
        self._guard = guard
        self._ready = ready
        guard.on_failure = self._end

    @property
    def failed(self) -> bool:
        """Whether it ended because of a bug."""
        return self._guard.failed

    def _end(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no connection more; then, a moment later, close those that say nothing."""
        self._guard.draining = True
        for server in self.servers:
            server.close()
        if self.server_state.connections:
            await asyncio.sleep(GRACE_SECONDS)
        await super().shutdown(sockets)


def server(
    guard: Guard,
    *,
    ready: Callable[[], None],
    drain_seconds: float,
    cors: Sequence[str] = (),
    certificate: Path | None = None,
    key: Path | None = None,
) -> Server:
    """A server that is not started.

    Args:
        guard: the application.
        ready: called when requests are taken.
        drain_seconds: after which what is still running is given up.
        cors: origins whose pages may ask; none: CORS is off.
        certificate: for TLS.
        key: its key.
    """
    app: ASGIApp = guard
    if cors:
        # Outside the guard: a browser asks first, and without the key.
        app = CORSMiddleware(
            guard,
            allow_origins=list(cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id", "x-qrank-model"],
        )
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(int(drain_seconds), 1),
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return Server(config, guard, ready)


def run(server: Server, sockets: list[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT, and then until everything accepted is answered.

    Raises:
        QrankError: a bug of ours ended a queue; what could be answered was.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("qrank.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    # uvicorn raises the signal again once it is done: that is an end like any other.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=sockets)
    if server.failed:
        raise QrankError("a queue of the server failed; the log above says why")
