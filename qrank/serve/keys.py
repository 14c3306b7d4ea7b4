"""API keys: read from a file, and asked of every request that is no probe."""

from __future__ import annotations

import hmac
from pathlib import Path

from starlette.datastructures import Headers

from qrank.errors import InputError
from qrank.serve.request import RequestError
from qrank.system.textfiles import read_lines

OPEN = frozenset({"/health", "/ready"})
"""Routes that need no key: what starts and balances servers has none."""


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys of a file, one a line.

    Raises:
        InputError: it holds none.
    """
    keys = tuple(line.strip().encode() for line in read_lines(path) if line.strip())
    if not keys:
        raise InputError(f"{path} holds no key; write one a line")
    return keys


def check_key(keys: tuple[bytes, ...], route: str, headers: Headers) -> None:
    """Let a request through that sends one of the keys, or where there are none.

    Raises:
        RequestError: 401.
    """
    if not keys or route in OPEN:
        return
    given = headers.get("authorization", "").partition(" ")[2].strip().encode()
    # All are compared, each in constant time: how long it takes tells nothing.
    right = [hmac.compare_digest(given, key) for key in keys]
    if not any(right):
        raise RequestError(401, "a key is needed: send the header Authorization: Bearer KEY")
