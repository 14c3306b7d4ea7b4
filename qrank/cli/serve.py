"""`qrank serve`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qrank.cli.common import ARGUMENTS, FiniteRange, debug_option, notice
from qrank.cli.served import open_served, served_options
from qrank.scoring.memory import MemoryBudget
from qrank.system.extras import need
from qrank.system.frozen import frozen
from qrank.system.machine import processors

if TYPE_CHECKING:  # it takes the packages of extra `serve`
    from qrank.serve.workers import Worker

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_SECONDS = FiniteRange(min=0, min_open=True)


@click.command()
@served_options
@click.option(
    "--workers",
    type=_COUNT,
    default=1,
    show_default=True,
    help="Processes that serve. Each opens all models, with its part of --threads and "
    "--max-memory; a worker that dies is replaced.",
)
@click.option(
    "--idle-unload",
    "idle_seconds",
    type=_SECONDS,
    metavar="SECONDS",
    help="Close a model that had no request for so long; its next request opens it again.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address or host name to listen on; :: means all addresses, IPv6 and IPv4, and "
    "unix:PATH a Unix socket.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 chooses a free one.",
)
@click.option("--unix-socket", metavar="PATH", help="Listen on this Unix socket instead.")
@click.option(
    "--root-path",
    default="",
    metavar="PREFIX",
    help="Path prefix of the server behind a proxy, such as /rank, stripped by it or not.",
)
@click.option(
    "--api-key-file",
    type=_FILE,
    help="Keys, one per line; a request must send one as Bearer.",
)
@click.option(
    "--cors-origin",
    "--allow-origin",
    "cors_origin",
    multiple=True,
    help="Origin allowed to send requests; can be repeated.",
)
@click.option("--tls-cert", type=_FILE, help="Certificate for HTTPS (PEM).")
@click.option("--tls-key", type=_FILE, help="Private key of the certificate (PEM).")
@click.option(
    "--request-timeout",
    type=_SECONDS,
    default=60.0,
    show_default=True,
    help="Time limit of a request in seconds, then it gets a 503.",
)
@click.option(
    "--queue-tokens",
    type=_COUNT,
    default=500_000,
    show_default=True,
    help="Tokens that may wait per model; further requests get a 429.",
)
@click.option(
    "--max-documents",
    type=_COUNT,
    default=2_000,
    show_default=True,
    help="Maximum documents per request.",
)
@click.option(
    "--max-characters",
    type=_COUNT,
    default=1_000_000,
    show_default=True,
    help="Maximum characters of a text.",
)
@click.option(
    "--max-body",
    type=_COUNT,
    default=10_000_000,
    show_default=True,
    help="Maximum bytes of a request.",
)
@click.option(
    "--body-timeout",
    type=_SECONDS,
    default=10.0,
    show_default=True,
    help="Time limit for receiving a request's body, in seconds.",
)
@click.option(
    "--drain-timeout",
    type=_SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds for running requests to finish when the server stops.",
)
@click.option(
    "--drain-delay",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds to go on accepting requests after SIGTERM while /ready says 503, so that a load "
    "balancer sends no more.",
)
@click.option("--no-page", is_flag=True, help="Do not serve the page at /.")
@debug_option
@click.pass_context
def serve(
    context: click.Context,
    /,
    models: tuple[str, ...],
    workers: int,
    idle_seconds: float | None,
    host: str,
    port: int,
    unix_socket: str | None,
    root_path: str,
    api_key_file: Path | None,
    cors_origin: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    request_timeout: float,
    queue_tokens: int,
    max_documents: int,
    max_characters: int,
    max_body: int,
    body_timeout: float,
    drain_timeout: float,
    drain_delay: float,
    no_page: bool,
    **serving: Any,
) -> None:
    """Serve models over HTTP, in the dialects of other servers.

    MODEL is a bundled name, a bundle's folder or a hub id, "mini" by default; --revision goes with
    a single one. A checkpoint on the hub is converted first, as in qrank score. Requests choose a
    model by its NAME, or get the first. A single model answers to any name. Clients of TEI, Jina,
    Cohere, vLLM, llama.cpp and Ollama work without changes; /docs describes all routes. In a
    browser, / is a page to try the models and to compare them.

    \b
      qrank serve
      qrank serve mini legal=./my-bundle --port 8080
      qrank serve --host unix:/run/qrank.sock
      qrank serve --workers 4
      curl localhost:8000/rerank -H 'content-type: application/json' \\
        -d '{"query": "which planet is red?", "texts": ["mars", "bread"]}'
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        need(module)
    from qrank.serve.keys import read_keys
    from qrank.serve.listening import UNIX, Listening, listen
    from qrank.serve.request import Limits
    from qrank.serve.server import GRACE_SECONDS, log_to_stderr, run, server
    from qrank.serve.workers import Supervisor, Worker

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if unix_socket is not None:
        if context.get_parameter_source("host") is not ParameterSource.DEFAULT:
            raise click.UsageError("give --host or --unix-socket, not both")
        host = f"{UNIX}{unix_socket}"
    root = f"/{root_path.strip('/')}" if root_path.strip("/") else ""
    keys = read_keys(api_key_file) if api_key_file else ()
    limits = Limits(
        documents=max_documents,
        characters=max_characters,
        body=max_body,
        body_seconds=body_timeout,
        queue_tokens=queue_tokens,
        seconds=request_timeout,
    )
    worker = context.find_object(Worker)
    _check_workers(workers, serving["threads"])
    if worker is not None:
        _share(workers, serving)

    def serves(said: Sequence[str], listening: Listening) -> None:
        for line in said:
            notice(line)
        notice(f"serving at {' and '.join(listening.addresses('https' if tls_cert else 'http'))}")

    with ExitStack() as opened:
        if worker is None:
            listening = opened.enter_context(listen(host, port))
            if not keys and listening.public:
                notice("anyone who reaches this address can use it: no --api-key-file is given")
        if workers > 1 and worker is None:
            log_to_stderr()
            Supervisor(
                workers,
                partial(_work, context.meta[ARGUMENTS]),
                listening.sockets,
                stop_seconds=drain_delay + GRACE_SECONDS + drain_timeout,
            ).run(partial(serves, listening=listening))
            return
        from qrank.serve.app import build  # not in the supervisor, which does without

        served, settings = open_served(opened, models, **serving)
        said = [f"{each.name} is {each.target or 'opened at its first request'}" for each in served]
        guard = build(
            served,
            limits=limits,
            keys=keys,
            root=root,
            page=not no_page,
            idle_seconds=idle_seconds,
            **settings,
        )
        made = server(
            guard,
            ready=partial(serves, said, listening) if worker is None else worker.serving,
            drain_seconds=drain_timeout,
            drain_delay=drain_delay,
            cors=cors_origin,
            certificate=tls_cert,
            key=tls_key,
        )
        if worker is not None:
            worker.opened(said)
        log_to_stderr(None if worker is None else worker.number)
        run(made, listening.sockets if worker is None else worker.sockets)


def _check_workers(workers: int, threads: int | None) -> None:
    if workers > 1 and (os.name != "posix" or frozen()):
        where = "a frozen application" if frozen() else "this system"
        raise click.UsageError(f"--workers: {where} runs one; start several servers instead")
    if threads is not None and threads < workers:
        raise click.UsageError(f"each of {workers} --workers takes a thread: give more --threads")


def _share(workers: int, opening: dict[str, Any]) -> None:
    """Give the models that this process opens a worker's part of the machine."""
    opening["threads"] = max((opening["threads"] or processors()) // workers, 1)
    if opening["max_memory"] is not None:
        opening["max_memory"] //= workers
    MemoryBudget.sharers = workers


def _work(arguments: Sequence[str], worker: Worker) -> None:
    """Run the command as a worker, in a process of its own."""
    # By its name, because it imports this module.
    main = importlib.import_module("qrank.cli").main
    main(list(arguments), prog_name="qrank", obj=worker)
