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
    """One request, from its start to the end of its answer.

    Attributes:
        identity: the client's `x-request-id` if it is short and plain, or else a new one.
        status: of the answer; 0 before it starts.
    """

    def __init__(
        self, method: str, path: str, identity: str, state: dict[str, Any], metrics: Metrics
    ) -> None:
        """Start the clock.

        Args:
            method: of the request.
            path: the route, or "other", so that unknown paths do not create counters.
            identity: the header `x-request-id`, or "".
            state: of the request; its `said` holds more fields for the log line.
            metrics: count the request.
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
        """Count and log the request, once; further calls do nothing."""
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
