"""Requests to the application in this process, without a port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message


@asynccontextmanager
async def started(app: ASGIApp) -> AsyncIterator[None]:
    """Start the application, as a server does, and stop it after the block."""
    said: asyncio.Queue[Message] = asyncio.Queue()
    heard: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.ensure_future(app(scope, said.get, heard.put))
    try:
        await said.put({"type": "lifespan.startup"})
        await _answered(heard, task)
        yield
        await said.put({"type": "lifespan.shutdown"})
        await _answered(heard, task)
        await task
    finally:
        task.cancel()


async def _answered(heard: asyncio.Queue[Message], task: asyncio.Task[None]) -> None:
    """Wait for an answer to a message about the application's life; raise its error."""
    answer = asyncio.ensure_future(heard.get())
    await asyncio.wait({answer, task}, return_when=asyncio.FIRST_COMPLETED)
    if not answer.done():
        answer.cancel()
        task.result()
        raise RuntimeError("the application ended early")
    if answer.result()["type"].endswith(".failed"):
        raise RuntimeError(answer.result()["message"])


async def request(
    app: ASGIApp, method: str, path: str, body: bytes
) -> tuple[int, dict[str, str], bytes]:
    """Send a request of JSON; return the answer's status, headers and body."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {},
    }
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    answers: list[Message] = []
    never = asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await never.wait()  # this client does not hang up
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        answers.append(message)

    await app(scope, receive, send)
    found = {
        name.decode("latin-1"): value.decode("latin-1") for name, value in answers[0]["headers"]
    }
    content = b"".join(message.get("body", b"") for message in answers[1:])
    return answers[0]["status"], found, content
