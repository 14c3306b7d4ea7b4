"""Exceptions -> error answers in the shape of the request's dialect."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qrank.serve.dialect import Dialects, ErrorShape
from qrank.serve.encodings import accepted
from qrank.serve.request import RequestError
from qrank.serve.validation import reasons


def refuse(shape: ErrorShape, error: RequestError) -> JSONResponse:
    """The answer to a request that is refused."""
    status, content = shape(error.status, error.message)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 415:
        headers["accept-encoding"] = accepted()
    if error.status in (408, 413):
        headers["connection"] = "close"
    return JSONResponse(content, status, headers)


def add_handlers(app: FastAPI, dialects: Dialects) -> None:
    """Make an application answer every exception in the shape of the request's dialect."""

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        shape, found = request.state.error_shape, error.errors()
        if found[0]["type"] == "json_invalid":
            reason, place = found[0]["ctx"]["error"], found[0]["loc"][-1]
            refusal = RequestError(400, f"the body is no JSON: {reason}, at character {place}")
        elif isinstance(error.body, bytes):
            refusal = RequestError(422, "send JSON, with content-type: application/json")
        else:
            shape = dialects.of(request.state.path, error.body).error
            refusal = RequestError(422, reasons(found))
        return refuse(shape, refusal)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = _unreadable(error.__cause__) or str(error.detail)
        if error.status_code == 404:
            # Clients are often given a base URL where they want a whole one.
            said = f"there is nothing at this path; requests go to {', '.join(dialects.paths)}"
        response = refuse(request.state.error_shape, RequestError(error.status_code, said))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, _failed)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refuse(request.state.error_shape, error)


def _unreadable(error: BaseException | None) -> str | None:
    """Why a body could not be parsed, if that caused an HTTPException."""
    match error:
        case UnicodeDecodeError():
            return f"the body is no UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        case RecursionError():
            return "the body is nested too deeply"
        case ValueError():
            return "the body holds a number with too many digits"
    return None


async def _failed(request: Request, error: Exception) -> Response:
    refusal = RequestError(500, "the server made a mistake; its log says which")
    return refuse(request.state.error_shape, refusal)
