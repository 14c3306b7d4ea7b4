"""`qrank serve`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from qrank.cli.common import FiniteRange, debug_option, memory_option, notice
from qrank.extras import need
from qrank.locate import DEFAULT
from qrank.reranker import Reranker

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_SECONDS = FiniteRange(min=0, min_open=True)


@click.command()
@click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@click.option("--backend", help="onnx, openvino-int8, ...  [default: the preferred variant]")
@click.option("--device", help="cpu, cuda, gpu, npu, metal, ...  [default: cpu]")
@click.option("--threads", type=_COUNT, help="CPU threads of each model.  [default: all]")
@click.option("--max-length", type=int, help="Tokens of a pair.  [default: the model's limit]")
@memory_option
@click.option(
    "--api-key-file", type=_FILE, help="Keys, one a line; a request must send one as Bearer."
)
@click.option("--cors-origin", multiple=True, help="Origin whose pages may ask; repeat for more.")
@click.option("--tls-cert", type=_FILE, help="Certificate (PEM), for HTTPS.")
@click.option("--tls-key", type=_FILE, help="The certificate's key (PEM).")
@click.option(
    "--request-timeout",
    type=_SECONDS,
    default=60.0,
    show_default=True,
    help="Seconds a request may take; after that it gets a 503.",
)
@click.option(
    "--queue-tokens",
    type=_COUNT,
    default=500_000,
    show_default=True,
    help="Tokens that may wait for a model; more get a 429.",
)
@click.option(
    "--max-documents",
    type=_COUNT,
    default=2_000,
    show_default=True,
    help="Documents of a request.",
)
@click.option(
    "--max-characters",
    type=_COUNT,
    default=1_000_000,
    show_default=True,
    help="Characters of a text.",
)
@click.option(
    "--max-body",
    type=_COUNT,
    default=10_000_000,
    show_default=True,
    help="Bytes of a request.",
)
@click.option(
    "--body-timeout",
    type=_SECONDS,
    default=10.0,
    show_default=True,
    help="Seconds in which a request's body must come.",
)
@click.option(
    "--drain-timeout",
    type=_SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds for what runs when it is told to stop.",
)
@debug_option
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    backend: str | None,
    device: str | None,
    threads: int | None,
    max_length: int | None,
    max_memory: int | None,
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
) -> None:
    """Answer rerank requests over HTTP, in the dialects of other servers.

    MODEL is a bundled name, a bundle's folder or a hub id, "mini" by default; requests choose one
    by its NAME, and get the first if they name none. Clients of TEI, Jina, Cohere, vLLM, llama.cpp
    and Ollama work as they are; /docs describes all there is.

    \b
      qrank serve
      qrank serve mini legal=./my-bundle --port 8080
      curl localhost:8000/rerank -H 'content-type: application/json' \\
        -d '{"query": "which planet is red?", "texts": ["mars", "bread"]}'
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        need(module)
    from qrank.serve.app import build
    from qrank.serve.guard import Limits, read_keys
    from qrank.serve.server import listen, run, server

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    keys = read_keys(api_key_file) if api_key_file else ()
    limits = Limits(
        documents=max_documents,
        characters=max_characters,
        body=max_body,
        body_seconds=body_timeout,
        queue_tokens=queue_tokens,
        seconds=request_timeout,
    )
    with ExitStack() as opened:
        listening = opened.enter_context(listen(host, port))
        served: dict[str, Reranker] = {}
        for model in models or (DEFAULT,):
            name, _, source = model.rpartition("=")
            reranker = opened.enter_context(
                Reranker(
                    source,
                    backend=backend,
                    device=device,
                    threads=threads,
                    max_length=max_length,
                    max_memory=max_memory,
                )
            )
            # A folder is no name to ask for.
            name = name or (reranker.manifest.name if Path(source).is_dir() else source)
            if name in served:
                raise click.UsageError(f"two models are called {name!r}; name one: NAME={source}")
            served[name] = reranker
        here = listening.getsockname()
        where = f"[{here[0]}]" if ":" in here[0] else here[0]
        url = f"http{'s' if tls_cert else ''}://{where}:{here[1]}"

        def ready() -> None:
            for name, reranker in served.items():
                notice(f"{name} is {reranker.target.name}")
            notice(f"serving at {url}")

        if not keys and not (here[0].startswith("127.") or here[0] == "::1"):
            notice("anyone who reaches this address can use it: no --api-key-file is given")
        made = server(
            build(served, limits=limits, keys=keys),
            ready=ready,
            drain_seconds=drain_timeout,
            cors=cors_origin,
            certificate=tls_cert,
            key=tls_key,
        )
        run(made, listening)
