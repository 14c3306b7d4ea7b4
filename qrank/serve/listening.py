"""Sockets of a server: TCP addresses and Unix sockets."""

from __future__ import annotations

import errno
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from qrank.errors import InputError, QrankError

UNIX = "unix:"
"""Prefix of a host that is the path of a Unix socket."""

_BACKLOG = 2048
_TRIES = 10
"""Attempts to find a port that is free at several addresses."""

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@dataclass
class Listening:
    """Listening sockets; `close` removes the file of a Unix socket.

    Attributes:
        sockets: ready to accept.
    """

    sockets: list[socket.socket]
    _file: Path | None = None
    _identity: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def public(self) -> bool:
        """Whether other machines may reach the server."""
        return self._file is None and any(
            not (host.startswith("127.") or host == "::1")
            for host in (found.getsockname()[0] for found in self.sockets)
        )

    def addresses(self, scheme: str) -> list[str]:
        """The addresses, as text for messages."""
        if self._file is not None:
            return [f"{UNIX}{self._file}"]
        return [f"{scheme}://{_name(found)}" for found in self.sockets]

    def close(self) -> None:
        """Close the sockets."""
        for found in self.sockets:
            found.close()
        # Another server may have replaced the file with its own.
        if self._file is not None and _identity(self._file) == self._identity:
            self._file.unlink(missing_ok=True)

    def __enter__(self) -> Listening:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def listen(host: str, port: int) -> Listening:
    """Open listening sockets.

    Args:
        host: an address, a name (all its addresses on this machine), `::` for all IPv6 and IPv4
            addresses, or `unix:PATH`.
        port: 0 for any free port.

    Raises:
        QrankError: the address is in use, or is not one of this machine.
        InputError: it is not an address.
    """
    if host.startswith(UNIX):
        return _listen_at_file(Path(host.removeprefix(UNIX)))
    bare = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    try:
        if not bare:
            raise OSError("it is empty")
        found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host!r} is no address ({_reason(error)}); give one such as 127.0.0.1, "
            "0.0.0.0, ::, a name, or unix:/run/qrank.sock, and the port with --port"
        ) from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for attempt in range(_TRIES):
        try:
            sockets = _bind_all(addresses)
            break
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port == 0 and attempt + 1 < _TRIES:
                continue
            raise QrankError(
                f"cannot listen at --host {host} --port {port}: {_reason(error)}"
            ) from error
    return Listening(sockets)


def _bind_all(addresses: Sequence[tuple[int, tuple[Any, ...]]]) -> list[socket.socket]:
    """A socket for each address of this machine, all with the same port."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, (host, port, *rest) in addresses:
            if sockets:
                port = sockets[0].getsockname()[1]
            try:
                found = socket.create_server(
                    (host, port, *rest),
                    family=family,
                    backlog=_BACKLOG,
                    dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
                )
            except OSError as error:
                # A name may have an IPv6 address while IPv6 is turned off on this machine.
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
            else:
                sockets.append(found)
        if not sockets and missing is not None:
            raise missing
    except OSError:
        for found in sockets:
            found.close()
        raise
    return sockets


def _name(found: socket.socket) -> str:
    """`127.0.0.1:8000`, `[::]:8000 (IPv4 too)`."""
    host, port = found.getsockname()[:2]
    if found.family != socket.AF_INET6:
        return f"{host}:{port}"
    both = host == "::" and not found.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return f"[{host}]:{port}{' (IPv4 too)' if both else ''}"


def _listen_at_file(path: Path) -> Listening:
    """Listen at a Unix socket; a file where no process listens is replaced."""
    where = f"--host {UNIX}{path}"
    if not hasattr(socket, "AF_UNIX"):
        raise InputError(f"{where}: there are no Unix sockets here; give an address")
    found = socket.socket(socket.AF_UNIX)
    try:
        _clear(path)
        found.bind(str(path))
        found.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        found.close()
        raise QrankError(f"cannot listen at {where}: {_reason(error)}") from error
    return Listening([found], path, _identity(path))


def _clear(path: Path) -> None:
    """Remove the socket file of a killed server.

    Raises:
        OSError: a process listens there, or the file is not a socket.
    """
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "there is a file of that name, which is no socket")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass  # a busy server listens there
    raise OSError(errno.EADDRINUSE, "another server listens there")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
