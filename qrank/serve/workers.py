"""Several workers behind the same sockets: processes that are started, replaced and stopped."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from prometheus_client import multiprocess

from qrank.errors import QrankError
from qrank.serve.metrics import FOLDER
from qrank.serve.notify import notify, notify_stopping
from qrank.system.paths import cache_folder
from qrank.system.signals import Ended

DEATHS = 5
"""A worker that dies so many times in a row ends the server."""

STEADY_SECONDS = 60.0
"""A worker that served so long before it died does not die in a row."""

_MARGIN = 10.0
"""Seconds a worker may take to end beyond those that its requests have."""

log = logging.getLogger("qrank.serve")


class Worker:
    """What a worker's process is given. It stops when the supervisor stops it, or is gone.

    Attributes:
        number: 1 for the first.
        sockets: to accept connections from.
    """

    def __init__(
        self, number: int, sockets: list[socket.socket], line: Connection, seconds: float
    ) -> None:
        """Made by the supervisor, and sent to the process."""
        self.number = number
        self.sockets = sockets
        self._line = line
        self._seconds = seconds

    def begin(self) -> None:
        """In the process: follow the supervisor from now on; call it on the main thread."""
        # Ctrl-C and the end of a terminal reach all processes: the supervisor decides.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.environ.pop("NOTIFY_SOCKET", None)  # only the supervisor knows when all are ready
        self._may_serve = threading.Event()
        threading.Thread(target=self._follow, daemon=True, name="qrank-worker").start()

    def opened(self, said: Sequence[str]) -> None:
        """Report that the models are open, with what to tell the user; wait for the others."""
        self._line.send(list(said))
        self._may_serve.wait()

    def serving(self) -> None:
        """Report that it accepts requests."""
        self._line.send(None)

    def _follow(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._line.recv()
                self._may_serve.set()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)
        time.sleep(self._seconds)
        os._exit(1)  # it hangs: nobody else would end it if the supervisor was killed


class _Place:
    """One of the workers, and those that replaced it.

    Attributes:
        number: 1 for the first.
        process: the one that runs.
        line: to it.
        opened: its models are open.
        served: when it began to serve; None before.
        deaths: how many processes died here in a row.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.deaths = 0
        self.opened = False
        self.served: float | None = None
        self.process: SpawnProcess
        self.line: Connection

    def start(
        self, work: Callable[[Worker], None], sockets: list[socket.socket], seconds: float
    ) -> None:
        """Start a process."""
        spawn = multiprocessing.get_context("spawn")
        self.line, other = spawn.Pipe()
        worker = Worker(self.number, sockets, other, seconds)
        self.process = spawn.Process(target=_run, args=(work, worker), daemon=True)
        self.process.start()
        other.close()  # so that the line ends with the process
        self.opened, self.served = False, None

    def let_serve(self) -> None:
        """Tell the process that it may serve."""
        with contextlib.suppress(OSError):  # it has died: the line's end will say so
            self.line.send(None)

    def died(self) -> str:
        """Take note that the process has died; how it did, in words."""
        self.line.close()
        self.process.join(_MARGIN)
        self.process.kill()
        self.process.join()
        steady = self.served is not None and time.monotonic() - self.served >= STEADY_SECONDS
        self.deaths = 1 if steady else self.deaths + 1
        return self.fate()

    def fate(self) -> str:
        """How its process ended, in words."""
        code = self.process.exitcode
        assert code is not None
        if code >= 0:
            return f"ended with exit code {code}"
        killed = f"was killed by {signal.Signals(-code).name}"
        return f"{killed}, perhaps for lack of memory" if code == -signal.SIGKILL else killed


class Supervisor:
    """Starts the workers, replaces those that die, and stops them."""

    def __init__(
        self,
        count: int,
        work: Callable[[Worker], None],
        sockets: list[socket.socket],
        *,
        stop_seconds: float,
    ) -> None:
        """Describe the workers; `run` starts them.

        Args:
            count: how many.
            work: serves until SIGTERM, in a new process; it is sent there by pickle.
            sockets: that all workers accept from; they are closed when the workers are stopped.
            stop_seconds: that a worker may take to answer its last requests.
        """
        self._places = [_Place(number + 1) for number in range(count)]
        self._running: list[_Place] = []
        self._work = work
        self._sockets = sockets
        self._seconds = stop_seconds + _MARGIN
        self._may_serve = False
        self._ready = False
        self._said: list[str] = []

    def run(self, ready: Callable[[Sequence[str]], None]) -> None:
        """Run the workers until SIGTERM or SIGINT, and until all accepted requests are answered.

        The first one starts alone: what it proves, converts and compiles, the others find in the
        cache. None serves before all can.

        Args:
            ready: called when all workers serve, with what the first one said.

        Raises:
            SystemExit: a worker could not start, and has said why; with its exit code. Or a signal
                came before all could serve.
            QrankError: a worker died again and again, or was killed in its start or at its end.
        """
        with _shared_folder() as self._folder, _signals() as stop:
            try:
                self._start(self._places[0])
                if number := self._follow(stop, self._all_serve):
                    raise Ended(number)
                self._ready = True
                ready(self._said)
                notify("READY=1")
                self._follow(stop, lambda: False)
            except BaseException:
                self._end(stop)
                raise
            if failed := self._end(stop):
                raise QrankError(f"the server stopped, but {'; '.join(failed)}")

    def _all_serve(self) -> bool:
        return all(place.served is not None for place in self._places)

    def _start(self, place: _Place) -> None:
        place.start(self._work, self._sockets, self._seconds)
        self._running.append(place)

    def _follow(self, stop: Connection, until: Callable[[], bool]) -> int:
        """Listen to the workers; the number of a signal that came, or 0 once `until` holds."""
        while not until():
            lines = {place.line: place for place in self._running}
            for line in wait([*lines, stop]):
                assert isinstance(line, Connection)
                if line is stop:
                    number: int = stop.recv()
                    return number
                try:
                    said = line.recv()
                except (EOFError, OSError):
                    self._replace(lines[line])
                else:
                    self._heard(lines[line], said)
        return 0

    def _heard(self, place: _Place, said: list[str] | None) -> None:
        if said is None:
            place.served = time.monotonic()
            return
        place.opened = True
        self._said = self._said or said
        for other in self._places:
            if other not in self._running:
                self._start(other)
        if self._may_serve:
            place.let_serve()
        elif all(other.opened for other in self._places):
            self._may_serve = True
            for other in self._places:
                other.let_serve()

    def _replace(self, place: _Place) -> None:
        """Start another process where one has died.

        Raises:
            SystemExit, QrankError: see `run`.
        """
        how = place.died()
        self._running.remove(place)
        multiprocess.mark_process_dead(place.process.pid, str(self._folder))
        code = place.process.exitcode or 1
        if not self._ready:
            if code > 0:
                raise SystemExit(code)  # it has said why
            raise QrankError(
                f"worker {place.number} of {len(self._places)} {how}, before all served; each "
                "worker holds all models: give fewer --workers"
            )
        if place.deaths >= DEATHS:
            raise QrankError(
                f"worker {place.number} died {place.deaths} times in a row, each time within "
                f"{STEADY_SECONDS:.0f} s; the last {how}"
            )
        log.error("worker %d (process %d) %s; another starts", place.number, place.process.pid, how)
        self._start(place)

    def _end(self, stop: Connection) -> list[str]:
        """Stop all workers; those that served and did not end well, in words."""
        notify_stopping()
        for found in self._sockets:
            found.close()  # or connections would wait here after the last worker has gone
        for place in self._running:
            place.line.close()
        waiting = {place.process.sentinel: place for place in self._running}
        deadline = time.monotonic() + self._seconds
        failed = []
        while waiting:
            ended = wait([*waiting, stop], max(deadline - time.monotonic(), 0))
            if (stop in ended and stop.recv() == signal.SIGINT) or not ended:
                for place in waiting.values():
                    place.process.kill()
                deadline += self._seconds
            for place in [waiting.pop(found) for found in ended if found in waiting]:
                place.process.join()
                if place.process.exitcode and place.served is not None:
                    failed.append(f"worker {place.number} {place.fate()}")
        return failed


def _run(work: Callable[[Worker], None], worker: Worker) -> None:
    worker.begin()
    work(worker)


@contextlib.contextmanager
def _signals() -> Iterator[Connection]:
    """SIGTERM and SIGINT, as numbers to receive: a wait can end at them, and nothing else does."""
    here, there = multiprocessing.Pipe(duplex=False)

    def tell(number: int, frame: FrameType | None) -> None:
        there.send(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield here
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    """A folder for the workers' metrics, and for their cache if there is none."""
    with tempfile.TemporaryDirectory(prefix="qrank-") as folder:
        # Not from the current folder: its files must not shadow Python's own.
        named = {FOLDER: folder, "PYTHONSAFEPATH": "1"}
        if cache_folder() is None:
            named["QRANK_CACHE"] = str(Path(folder) / "cache")
        before = {name: os.environ.get(name) for name in named}
        os.environ.update(named)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
