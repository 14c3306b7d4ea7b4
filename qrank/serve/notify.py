"""Messages to systemd, which starts a service with `Type=notify`."""

from __future__ import annotations

import logging
import os
import socket

from qrank.errors import QrankError


def notify(state: str) -> None:
    """Tell the service manager `READY=1` or `STOPPING=1`, if it waits for that (sd_notify).

    Raises:
        QrankError: it cannot be told, and would stop this process for being late.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            # An abstract name begins with a zero byte, which no variable can hold.
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            channel.sendall(state.encode())
    except OSError as error:
        raise QrankError(f"systemd cannot be told {state} at {address}: {error}") from error


def notify_stopping() -> None:
    """Tell it `STOPPING=1`; a warning if that fails, which is no reason to leave requests."""
    try:
        notify("STOPPING=1")
    except QrankError as error:
        logging.getLogger("qrank.serve").warning("%s", error)
