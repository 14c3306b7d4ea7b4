"""Work for a supervisor's workers that is over soon; a module that is quick to import."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrank.serve.workers import Worker


def fleeting(worker: Worker) -> None:
    """Serves for a moment and dies, if it is the first."""
    worker.opened([])
    worker.serving()
    time.sleep(0.5 if worker.number == 1 else 60)
    os._exit(9)


def stillborn(worker: Worker) -> None:
    """Is killed before it serves, unless it is the first."""
    if worker.number > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    worker.opened([])


def stubborn(worker: Worker) -> None:
    """Serves, and does not end when it is told to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker.opened(["here"])
    worker.serving()
    time.sleep(60)
