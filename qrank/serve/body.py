"""Bodies of requests: bounded in size and time, decompressed, then handed to the application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from qrank.serve.encodings import decompressed, too_large
from qrank.serve.request import Limits, RequestError

HELD_BODIES = 8
"""All bodies in use may take this many times the size limit; beyond, requests are refused."""


class Bodies:
    """Reads bodies, and counts the bytes of all bodies in use."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, headers: Headers, receive: Receive) -> AsyncIterator[bytes]:
        """Read a body and decompress it; it counts as in use until the block ends.

        Raises:
            RequestError: 400 if it is not compressed as its headers say, 408 if it does not arrive
                in time, 413 if it is too large, 415 for an unknown encoding, 429 if too many large
                bodies are in use.
        """
        body = await self._received(headers, receive)
        held = len(body)
        try:
            if encodings := ",".join(headers.getlist("content-encoding")):
                body = decompressed(body, encodings, self._limits.body)
                self._hold(len(body) - held)
                held = len(body)
            yield body
        finally:
            self._held -= held

    def _hold(self, size: int) -> None:
        if self._held + size > self._limits.body * HELD_BODIES:
            raise RequestError(429, "too many large bodies at a time", retry_after=1)
        self._held += size

    async def _received(self, headers: Headers, receive: Receive) -> bytes:
        """The body as it was sent; it counts as in use when this returns.

        A body that is too large is read to its end and discarded, within the time limit: a client
        that is still sending would not see the answer.
        """
        limit, size, held = self._limits.body, 0, 0
        parts: list[bytes] = []
        length = headers.get("content-length", "")
        large = length.isdigit() and int(length) > limit
        if large and headers.get("expect"):
            raise too_large(limit)  # the client waits for an answer before it sends the body
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the client hung up before its body was there")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit or large:
                        parts.clear()
                    else:
                        self._hold(len(part))
                        held += len(part)
                        parts.append(part)
                    if not message.get("more_body"):
                        break
            if size > limit:
                raise too_large(limit)
        except BaseException as error:
            self._held -= held
            if isinstance(error, TimeoutError):
                raise (
                    too_large(limit)
                    if large or size > limit
                    else RequestError(
                        408, f"the body did not come within {self._limits.body_seconds:g} s"
                    )
                ) from None
            raise
        return b"".join(parts)


def plain_headers(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """The headers of a request after its body was decompressed to this length."""
    body = (b"content-encoding", b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name not in body]
    return [*kept, (b"content-length", str(length).encode())]


def replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI `receive` that returns the body first, then the server's messages."""
    first = True

    async def replayed() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
