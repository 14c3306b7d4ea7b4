"""Files of requests in the format of OpenAI's Batch API and vLLM's `run-batch`: JSONL."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.types import ASGIApp

from qrank.errors import InputError
from qrank.serve import in_process
from qrank.serve.schemas import new_id
from qrank.system.safejson import parse_json, parse_object

AT_ONCE = 32
"""Requests that are worked on at a time, so that the queue of a model is never empty."""

EXPECTED = 'a request: {"custom_id": ..., "method": "POST", "url": "/v1/rerank", "body": {...}}'


async def answers(
    app: ASGIApp, name: str, lines: Iterable[tuple[int, str]]
) -> AsyncIterator[dict[str, Any]]:
    """Answer each line of a file, in order, except blank ones.

    Args:
        app: the server's application; it is started and stopped.
        name: of the file, for errors.
        lines: their numbers and texts.

    Yields:
        An object for each line: `id`, `custom_id`, and `response` with `status_code`,
        `request_id` and `body`. If the status is not 200, `body` is null and `error` has the
        answer; otherwise `error` is null.
    """
    async with in_process.started(app):
        waiting: deque[asyncio.Task[dict[str, Any]]] = deque()
        try:
            for number, line in lines:
                if not line.strip():
                    continue
                where = f"{name}, line {number}"
                waiting.append(asyncio.create_task(_answer(app, where, line)))
                if len(waiting) == AT_ONCE:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


async def _answer(app: ASGIApp, where: str, line: str) -> dict[str, Any]:
    custom_id, identity = None, new_id("batch-request")
    try:
        request = parse_object(line, where, EXPECTED)
        custom_id = request.get("custom_id")
        method, url = _target(request, where)
    except InputError as error:
        status, content = 400, {"message": str(error)}
    else:
        body = json.dumps(request.get("body")).encode()
        status, headers, answer = await in_process.request(app, method, url, body)
        identity, content = headers["x-request-id"], parse_json(answer)
    failed = status != 200
    return {
        "id": new_id("batch"),
        "custom_id": custom_id,
        "response": {
            "status_code": status,
            "request_id": identity,
            "body": None if failed else content,
        },
        "error": content if failed else None,
    }


def _target(request: dict[str, Any], where: str) -> tuple[str, str]:
    """Method and path of a request.

    Raises:
        InputError: a field is missing or has the wrong type.
    """
    if not isinstance(request.get("custom_id"), str):
        raise InputError(f"{where}: custom_id is missing or no string; give each line its own")
    if request.get("method", "POST") != "POST":
        raise InputError(f'{where}: method is no "POST"')
    url = request.get("url")
    if not isinstance(url, str) or not url.startswith("/") or not url.isascii():
        raise InputError(f'{where}: url is missing or no path; give one such as "/v1/rerank"')
    return "POST", url
