"""A server on a free port: in a thread of this process, or as `qrank serve` runs it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrank import Reranker
from qrank.serve.app import build
from qrank.serve.listening import listen
from qrank.serve.request import Limits
from qrank.serve.residence import ServedModel
from qrank.serve.server import server

SECONDS = 30


@contextmanager
def serving(
    models: Mapping[str, Reranker],
    *,
    limits: Limits | None = None,
    keys: tuple[bytes, ...] = (),
    cors: Sequence[str] = (),
    host: str = "127.0.0.1",
    **more: Any,
) -> Iterator[str]:
    """Serve models from a thread, with `more` passed to `build`; yield the URL."""
    listening = listen(host, 0)
    (url, *_) = listening.addresses("http")
    started = threading.Event()
    served = [ServedModel.of(name, reranker.engine) for name, reranker in models.items()]
    guard = build(served, limits=limits, keys=keys, **more)
    made = server(guard, ready=started.set, drain_seconds=5, cors=cors)
    thread = threading.Thread(target=lambda: asyncio.run(made.serve(sockets=listening.sockets)))
    thread.start()
    try:
        assert started.wait(SECONDS)
        yield url
    finally:
        made.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()
        listening.close()


@contextmanager
def process(
    *arguments: str | Path, said: list[str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `qrank serve` on a free port; once it serves, yield its URL and the process.

    Lines of stderr are appended to `said`. They are always read: a full pipe would block the
    server.
    """
    said = [] if said is None else said
    command = [str(Path(sys.executable).parent / "qrank"), "serve", "--port", "0"]
    here = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)]))
    started = subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": here},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stderr is not None
    try:
        for line in started.stderr:
            said.append(line)
            if found := re.search(r"serving at (\S+)", line):
                break
        else:
            raise AssertionError("it did not start")
        reader = threading.Thread(target=said.extend, args=(started.stderr,))
        reader.start()
        try:
            yield found[1], started
        finally:
            started.kill()
            reader.join(SECONDS)
    finally:
        started.kill()
        started.wait(SECONDS)
        started.stderr.close()
