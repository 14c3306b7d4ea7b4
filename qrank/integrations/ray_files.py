"""Score files of pairs on the nodes of a Ray cluster.

Each node has one process with the model (each GPU, on GPUs), and is given one piece after the
other: a file, or a part of one. It scores it as `qrank.score_files` does on one machine, into a
folder that all nodes see. So a node that dies loses nothing: another one gets its piece, and goes
on where it ended.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qrank.errors import InputError, QrankError
from qrank.integrations.ray_nodes import Node, everywhere, nodes
from qrank.pairs.job import Job
from qrank.pairs.plan import Piece, Shard
from qrank.pairs.score import ScoredFiles, Scoring
from qrank.reranker import Reranker
from qrank.scoring import arguments
from qrank.system.steps import Progress, no_progress

_TICK = 1.0
"""Seconds between two looks at the nodes and at what is done."""

_QUIET = 60.0
"""Seconds after which a warning says that no node has answered."""

_LOSSES = 3
"""Processes that a piece, or a node, may lose without getting any further."""

log = logging.getLogger("qrank")


def score_files(
    files: str | Path | Iterable[str | Path],
    folder: str | Path,
    *,
    model: str | Path = "mini",
    address: str | None = None,
    shards: int | None = None,
    progress: Progress = no_progress,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> ScoredFiles:
    """Score the pairs in files on all nodes of a cluster; the same files as `qrank.score_files`.

    The files, the folder and the model (if it is a folder) need the same path on every node: a
    shared file system. What was interrupted is continued by the same call, on any cluster.

    Args:
        files: as for `qrank.score_files`.
        folder: as for `qrank.score_files`.
        model: as for `Reranker`.
        address: of the cluster, if this process is not connected to one: "auto" or None finds a
            running one, "local" starts one on this machine.
        shards: cut the rows of all files into so many parts, if there are fewer files; a part is
            named `a.03-of-16.parquet`. None: whole files.
        progress: as for `qrank.score_files`.
        options: other arguments of `Reranker`. On a device other than `cpu`, each GPU that Ray
            counts has a process. `threads` is the number of a process; otherwise it is the node's
            CPUs but one, which Ray's own processes need.
        how: other arguments of `qrank.score_files`: `query_column`, `raw`, `rows`, ...

    Raises:
        InputError: as for `qrank.score_files`; or there is no cluster, or no node for a process.
        OSError: an output cannot be written.
        QrankError: as for `Reranker`; or the processes of a piece died several times.
    """
    count = arguments.whole("shards", shards, 1)
    every = None if count is None else [Shard(number, count) for number in range(count)]
    job = _absolute(Job.of(files, folder, every, **how))
    given = dict(options or {})
    with _connected(address):
        return _Cluster(job, everywhere(model), given, Scoring(job, progress)).run()


def _absolute(job: Job) -> Job:
    """With absolute paths: the other processes have other working directories."""
    pieces = [
        replace(piece, source=replace(piece.source, path=piece.source.path.absolute()))
        for piece in job.pieces
    ]
    return replace(job, folder=job.folder.absolute(), pieces=pieces)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, unless this process is."""
    if ray.is_initialized():
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    # Of a cluster that is started here; it would send statistics without asking.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address or "auto", logging_level=logging.WARNING, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the Ray cluster (address {address or 'auto'}) cannot be reached: {error}. Start one "
            "(ray start --head), or give address local for this machine alone"
        ) from error
    try:
        if main and before is not None:  # Ray's would end the process with another exit code
            signal.signal(signal.SIGTERM, before)
        yield
    finally:
        ray.shutdown()


class _Scorer:
    """An actor: holds the model, and scores one piece at a time.

    Args:
        job: what is scored.
        mark: a file that the driver has made in the job's folder.
        model: as for `Reranker`.
        options: other arguments of `Reranker`.
    """

    def __init__(self, job: Job, mark: Path, model: str, options: dict[str, Any]) -> None:
        self._job = job
        self._mark = mark
        self._model = model
        self._options = options
        self._reranker: Reranker | None = None
        self._rows = ("", 0, 0)

    def score(self, pieces: list[Piece]) -> ScoredFiles:
        """Score pieces; without one, only compare the folder's settings."""
        # Not in __init__: Ray turns its errors into text.
        if not self._mark.exists():
            raise InputError(
                f"{self._job.folder} is not the folder that the driver writes to: it must be on a "
                "file system that all nodes share"
            )
        if self._reranker is None:
            self._reranker = Reranker(self._model, **self._options)

        def tell(_: str, done: int, total: int) -> None:
            self._rows = (pieces[0].name, done, total)

        return Scoring(self._job, tell, pieces).run(self._reranker)

    def rows(self) -> tuple[str, int, int]:
        """The output that is being written, how many of its rows are done, and of how many."""
        return self._rows


_Spot = tuple[str, int]
"""A node, and which of its GPUs; 0 on CPUs."""


@dataclass
class _Worker:
    """An actor as the driver sees it.

    Attributes:
        node: where it is.
        actor: its handle.
        asked: the question how many rows are done, which is not answered yet.
        ready: whether it has answered one.
        rows: its last answer.
        piece: what it scores, or []: nothing but the comparison of settings. None: it is idle.
    """

    node: Node
    actor: Any
    asked: Any
    ready: bool = False
    rows: Sequence[int] = (0, 0)
    piece: list[Piece] | None = None


@dataclass
class _Losses:
    """How often in a row a process was lost without getting any further."""

    count: int = 0
    rows: int = 0

    def are_too_many(self, rows: int) -> bool:
        """Count one more, which had done so many rows."""
        self.count = 1 if rows > self.rows else self.count + 1
        self.rows = max(rows, self.rows)
        return self.count >= _LOSSES


class _Cluster:
    """Gives pieces to the nodes, until all are scored."""

    def __init__(self, job: Job, model: str, options: dict[str, Any], scoring: Scoring) -> None:
        self._job = job
        self._model = model
        self._options = {**options, "device": options.get("device") or "cpu"}
        self._on_gpu = self._options["device"] != "cpu"
        self._scoring = scoring
        self._workers: dict[_Spot, _Worker] = {}
        self._running: dict[Any, _Spot] = {}
        self._waiting: deque[list[Piece]] = deque()
        self._losses: defaultdict[str, _Losses] = defaultdict(_Losses)
        self._heard = time.monotonic()
        self._mark = job.folder / f"_ray.{secrets.token_hex(8)}"

    def run(self) -> ScoredFiles:
        """Score what is not there yet."""
        # With nothing to score, one process still compares the settings.
        self._waiting.extend([[piece] for piece in self._scoring.left()] or [[]])
        if not self._spots():
            raise InputError(self._no_node())
        self._job.folder.mkdir(parents=True, exist_ok=True)
        self._mark.touch()
        try:
            while self._waiting or self._running:
                self._start()
                self._listen()
                self._give()
                unready = [each.asked for each in self._workers.values() if not each.ready]
                if there := list(self._running) or unready:
                    done, _ = ray.wait(there, timeout=_TICK)
                else:  # all nodes are gone, and others may come
                    done = []
                    time.sleep(_TICK)
                for reference in done:
                    if reference in self._running:
                        self._take(reference)
                self._tell()
        finally:
            for worker in self._workers.values():
                ray.kill(worker.actor)
            self._mark.unlink(missing_ok=True)
        self._scoring.tell_of_outdated()
        return self._scoring.done

    def _spots(self) -> dict[_Spot, tuple[Node, int]]:
        """Where processes can be: the node, and how many threads they have there."""
        found = {}
        for node in nodes():
            for number in range(node.gpus if self._on_gpu else 1):
                share = (node.cpus - 1) // (node.gpus if self._on_gpu else 1)
                threads = self._options.get("threads") or max(share, 1)
                if threads <= node.cpus:
                    found[node.id, number] = (node, threads)
        return found

    def _no_node(self) -> str:
        wanted = "a GPU" if self._on_gpu else "CPUs"
        if threads := self._options.get("threads"):
            wanted += f" and {threads} CPUs" if self._on_gpu else f", {threads} of them"
        there = ", ".join(f"{each.cpus} CPUs and {each.gpus} GPUs" for each in nodes())
        return f"no node of the Ray cluster has {wanted}; they have: {there or 'none'}"

    def _start(self) -> None:
        """Start processes on nodes that have none, if there is work for them."""
        for spot, (node, threads) in self._spots().items():
            if len(self._workers) >= len(self._waiting) + len(self._running):
                return
            if spot not in self._workers:
                options = {**self._options, "threads": threads}
                actor = _ACTOR.options(
                    num_cpus=threads,
                    num_gpus=int(self._on_gpu),
                    # To answer while a piece is scored.
                    max_concurrency=2,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                ).remote(self._job, self._mark, self._model, options)
                self._workers[spot] = _Worker(node, actor, actor.rows.remote())

    def _listen(self) -> None:
        """Take answers about what is done."""
        for spot, worker in list(self._workers.items()):
            if not ray.wait([worker.asked], timeout=0)[0]:
                continue
            try:
                name, *rows = ray.get(worker.asked)
            except RayError as error:
                if worker.piece is None:  # otherwise `_take` sees it
                    self._lose(spot, error)
                continue
            if worker.piece and worker.piece[0].name == name:
                worker.rows = rows
            worker.ready = True
            worker.asked = worker.actor.rows.remote()
            self._heard = time.monotonic()
        if self._heard + _QUIET < time.monotonic():
            log.warning(
                "no node of the Ray cluster has answered for %d seconds: does another job hold "
                "its CPUs? (ray status)",
                _QUIET,
            )
            self._heard = float("inf")

    def _give(self) -> None:
        """Give pieces to processes that have none."""
        for spot, worker in self._workers.items():
            if worker.ready and worker.piece is None and self._waiting:
                worker.piece = self._waiting.popleft()
                self._running[worker.actor.score.remote(worker.piece)] = spot

    def _take(self, reference: Any) -> None:
        """Take the result of a piece, or notice that its process is gone."""
        spot = self._running.pop(reference)
        worker = self._workers[spot]
        assert worker.piece is not None
        try:
            self._scoring.add(next(iter(worker.piece), None), ray.get(reference))
        except RayTaskError as error:
            raise _told(error, worker.node) from error
        except RayError as error:
            self._waiting.appendleft(worker.piece)
            self._lose(spot, error)
        else:
            worker.piece, worker.rows = None, (0, 0)

    def _lose(self, spot: _Spot, error: RayError) -> None:
        """Forget a process; the next round starts another one.

        Raises:
            QrankError: too many were lost.
        """
        worker = self._workers.pop(spot)
        ray.kill(worker.actor)
        where, why = worker.node.address, " ".join(str(error).split())[:500]
        name = worker.piece[0].name if worker.piece else None
        if self._losses[name or spot[0]].are_too_many(worker.rows[0]):
            raise QrankError(
                f"{_LOSSES} processes for {name or where} ended without getting any further, the "
                f"last on {where}: {why}"
            )
        again = f", and {name} is given to another one" if name else ""
        log.warning("a process on %s ended%s: %s", where, again, why)

    def _tell(self) -> None:
        """Tell how much is done."""
        expected, done = self._scoring.expected, self._scoring.done.rows
        for worker in self._workers.values():
            if worker.piece and worker.rows[1]:
                expected.opened(worker.piece[0], worker.rows[1])
                done += worker.rows[0]
        expected.tell(done)


_ACTOR: Any = ray.remote(_Scorer)


def _told(error: RayTaskError, node: Node) -> Exception:
    """An error of another process as one of this one, if it is no mistake of ours."""
    cause: object = error.cause
    if isinstance(cause, QrankError):
        return type(cause)(f"{cause} (on {node.address})")
    if isinstance(cause, OSError) and cause.errno is not None:
        return OSError(cause.errno, f"{cause.strerror} (on {node.address})", cause.filename)
    found: Exception = error
    return found
