"""API keys: read from a file, and checked for every request."""

from __future__ import annotations

import hmac
from pathlib import Path

from starlette.datastructures import Headers

from qrank.errors import InputError
from qrank.serve.page import FILES
from qrank.serve.request import RequestError
from qrank.system.textfiles import read_lines

OPEN = frozenset({"/health", "/ready", *FILES})
"""Routes that need no key: supervisors and load balancers have none, and the page asks for one."""


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Read a file with one key per line.

    Raises:
        InputError: the file has no key.
    """
    keys = tuple(line.strip().encode() for line in read_lines(path) if line.strip())
    if not keys:
        raise InputError(f"{path} holds no key; write one a line")
    return keys


def check_key(keys: tuple[bytes, ...], route: str, headers: Headers) -> None:
    """Check that a request sends one of the keys, if there are any.

    Raises:
        RequestError: 401 if it does not.
    """
    if not keys or route in OPEN:
        return
    given = headers.get("authorization", "").partition(" ")[2].strip().encode()
    # Every key is compared in constant time, so that the duration reveals nothing.
    right = [hmac.compare_digest(given, key) for key in keys]
    if not any(right):
        raise RequestError(401, "a key is needed: send the header Authorization: Bearer KEY")
