"""Decompress bodies of requests, up to a limit: Content-Encoding and its codecs.

`br` and `zstd` work where a package for them is installed; zstd is part of Python 3.14.
"""

from __future__ import annotations

import functools
import importlib
import zlib
from collections.abc import Callable
from typing import Any

from qrank.serve.request import RequestError

_ENCODED_TWICE = 2
"""Maximum number of encodings applied to a body, one after the other."""

_OLD_NAMES = {"x-gzip": "gzip"}

_ZSTD_WINDOW = 23
"""Binary logarithm of the largest window of zstd: 8 MB, as RFC 9659 has it for HTTP."""

Codec = Callable[[bytes, int], bytes]
"""A compressed body and a limit -> the body, or somewhat more than `limit` bytes of it.

Raises CorruptError for anything but one whole stream.
"""


class CorruptError(Exception):
    """A body is not compressed in the way that its headers say."""


def _gzip(body: bytes, limit: int) -> bytes:
    return _with_zlib(body, limit, 31)


def _deflate(body: bytes, limit: int) -> bytes:
    # The standard means zlib's format; some clients send a raw deflate stream.
    head = int.from_bytes(body[:2])
    headed = head >> 8 & 15 == zlib.DEFLATED and head % 31 == 0
    return _with_zlib(body, limit, 15 if headed else -15)


def _with_zlib(body: bytes, limit: int, window: int) -> bytes:
    decompressor = zlib.decompressobj(window)
    try:
        found = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise CorruptError from error
    return _whole(found, limit, decompressor.eof and not decompressor.unused_data)


def _zstd(zstd: Any, body: bytes, limit: int) -> bytes:
    window = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
    decompressor = zstd.ZstdDecompressor(options=window)
    try:
        found = decompressor.decompress(body, limit + 1)
    except (zstd.ZstdError, EOFError) as error:
        raise CorruptError from error
    return _whole(found, limit, decompressor.eof and not decompressor.unused_data)


def _brotli(brotli: Any, body: bytes, limit: int) -> bytes:
    decompressor = brotli.Decompressor()
    try:
        found: bytes = decompressor.process(body, output_buffer_limit=limit + 1)
    except brotli.error as error:
        raise CorruptError from error
    return _whole(found, limit, decompressor.is_finished())


def _whole(found: bytes, limit: int, complete: bool) -> bytes:
    if len(found) <= limit and not complete:
        raise CorruptError
    return found


@functools.cache
def codecs() -> dict[str, Codec]:
    """The codecs that work here, by the name in Content-Encoding."""
    found: dict[str, Codec] = {"gzip": _gzip, "deflate": _deflate}
    brotli = _installed("brotli")
    # The first version that can stop at a limit.
    if hasattr(getattr(brotli, "Decompressor", None), "can_accept_more_data"):
        found["br"] = functools.partial(_brotli, brotli)
    zstd = _installed("compression.zstd") or _installed("backports.zstd")
    if zstd is not None:
        found["zstd"] = functools.partial(_zstd, zstd)
    return found


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def accepted() -> str:
    """The encodings that a body may have, as a value of the header Accept-Encoding."""
    return ", ".join(codecs())


def decompressed(body: bytes, encodings: str, limit: int) -> bytes:
    """Decompress a body.

    Args:
        body: as it was sent.
        encodings: the header Content-Encoding: names, in the order they were applied.
        limit: maximum bytes of the result.

    Raises:
        RequestError: 400 if it is not in that encoding, 413 beyond the limit, 415 for an unknown
            encoding.
    """
    names = [name.strip().lower() for name in encodings.split(",")]
    names = [_OLD_NAMES.get(name, name) for name in names if name not in ("", "identity")]
    if len(names) > _ENCODED_TWICE or set(names) - set(codecs()):
        raise RequestError(
            415, f"content-encoding is {encodings[:100]!r}; send {accepted()} or no encoding"
        )
    for name in reversed(names):
        try:
            body = codecs()[name](body, limit)
        except CorruptError:
            raise RequestError(400, f"the body is no {name}, which content-encoding says") from None
        if len(body) > limit:
            raise too_large(limit)
    return body


def too_large(limit: int) -> RequestError:
    """The refusal of a body beyond the limit."""
    return RequestError(
        413, f"the body is larger than {limit:,} bytes (--max-body); send fewer documents at a time"
    )
