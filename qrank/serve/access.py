"""The access log and the counters of requests."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from qrank.serve.metrics import Metrics

log = logging.getLogger("qrank.serve.access")

_IDENTITY = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class Access:
    """One request, from its first byte to its answer's last.

    Attributes:
        identity: the client's own `x-request-id` if it is short and plain, or a new one.
        status: of the answer; 0 as long as there is none.
    """

    def __init__(
        self, method: str, path: str, identity: str, state: dict[str, Any], metrics: Metrics
    ) -> None:
        """Begin.

        Args:
            method: as it came.
            path: the route, or "other": whatever else is asked for must not make more and more
                counters.
            identity: the header `x-request-id`, or "".
            state: the request's; its `said` holds more fields of the line at the end.
            metrics: where to count.
        """
        self.identity = identity if _IDENTITY.fullmatch(identity) else uuid.uuid4().hex
        self.status = 0
        self._method = method
        self._path = path
        self._state = state
        self._metrics = metrics
        self._started = time.perf_counter()
        self._ended = False

    def end(self) -> None:
        """Count and log the request; only the first call does."""
        if self._ended:
            return
        self._ended = True
        seconds = time.perf_counter() - self._started
        self._metrics.requests.labels(self._path, self.status or "none").inc()
        self._metrics.seconds.labels(self._path).observe(seconds)
        line = {
            "id": self.identity,
            "method": self._method,
            "path": self._path,
            "status": self.status or None,
            "ms": round(seconds * 1000, 1),
            **self._state.get("said", {}),
        }
        log.info("request", extra={"fields": line})
