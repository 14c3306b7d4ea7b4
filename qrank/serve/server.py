"""The server process, on uvicorn: signals, draining, the log."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qrank.errors import QrankError
from qrank.serve.guard import Guard
from qrank.serve.notify import notify, notify_stopping

HEAD_SECONDS = 10.0
"""Time to receive the head of a request, from its first byte or the start of the connection."""

KEEP_ALIVE_SECONDS = 75
"""Idle connections are closed after this: later than most clients, so that they close first."""

GRACE_SECONDS = 1.0
"""Time after SIGTERM for requests already under way on open connections."""


class JsonLines(logging.Formatter):
    """A log record as one line of JSON; `extra={"fields": {...}}` adds fields."""

    def __init__(self, always: Mapping[str, Any]) -> None:
        """Args: always: fields of every line."""
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **self._always,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content)


class Protocol(H11Protocol):
    """HTTP/1.1 with a time limit for the head of a request, which uvicorn does not have."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        # asyncio sets this only for sockets that name their protocol; sockets of
        # `socket.create_server` do not. Without it, the body of an answer waits 40 ms until the
        # client acknowledges the head.
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
    """uvicorn's server; on SIGTERM it answers all accepted requests before it exits."""

    def __init__(
        self, config: uvicorn.Config, guard: Guard, ready: Callable[[], None], delay: float
    ) -> None:
        """Make a server.

        Args:
            config: for uvicorn.
            guard: gets `draining` set at the end; if it fails, the server stops.
            ready: called when the server accepts requests.
            delay: seconds to go on accepting connections after SIGTERM.
        """
        super().__init__(config)
        self._guard = guard
        self._ready = ready
        self._delay = delay
        guard.on_failure = self._end

    @property
    def failed(self) -> bool:
        """Whether a bug stopped it."""
        return self._guard.failed

    def _end(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            self._ready()
            notify("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no new connections; after a moment, close the idle ones."""
        self._guard.draining = True
        notify_stopping()
        until = time.monotonic() + (0 if self.failed else self._delay)
        while time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.1)
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
    drain_delay: float = 0,
    cors: Sequence[str] = (),
    certificate: Path | None = None,
    key: Path | None = None,
) -> Server:
    """Make a server; `run` starts it.

    Args:
        guard: the application.
        ready: called when the server accepts requests.
        drain_seconds: time for running requests when it stops.
        drain_delay: seconds to go on accepting connections after SIGTERM, while /ready says 503.
        cors: origins whose pages may send requests; none: CORS is off.
        certificate: file for TLS.
        key: file with the certificate's key.
    """
    app: ASGIApp = guard
    if cors:
        # Outside the guard: a browser's preflight request has no key.
        app = CORSMiddleware(
            guard,
            allow_origins=list(cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id", "x-qrank-model", "x-qrank-cached"],
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
    return Server(config, guard, ready, drain_delay)


def log_to_stderr(worker: int | None = None) -> None:
    """Write the log as lines of JSON, with the number of the worker, if this process is one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines({} if worker is None else {"worker": worker}))
    for name, level in (("qrank.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def run(server: Server, sockets: list[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT, and until all accepted requests are answered.

    Raises:
        QrankError: a bug ended a queue.
    """
    # uvicorn raises the signal again at its end; that must not kill the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=sockets)
    if server.failed:
        raise QrankError("a queue of the server failed; the log above says why")
