"""`qrank serve`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import click
from click.core import ParameterSource

from qrank.bundle.locate import DEFAULT
from qrank.cli.common import (
    FiniteFloat,
    FiniteRange,
    criteria_options,
    debug_option,
    memory_option,
    notice,
)
from qrank.cli.lazy import device_option
from qrank.errors import InputError
from qrank.reranker import Reranker
from qrank.select.selection import Policy, Profile
from qrank.system.extras import need

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_SECONDS = FiniteRange(min=0, min_open=True)


@click.command()
@click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address or name to listen at; :: is every address of this machine, IPv6 and IPv4, and "
    "unix:PATH a Unix socket.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@click.option("--unix-socket", metavar="PATH", help="Listen at this Unix socket instead.")
@click.option(
    "--root-path",
    default="",
    metavar="PREFIX",
    help="Path under which a proxy offers the server, as /rank; whether it strips that or not.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="ALIAS=NAME",
    help="Another name that requests may give for the model NAME; repeat for more.",
)
@click.option(
    "--instruction",
    help="What relevant means, for requests that do not say it; for models that take that.",
)
@click.option(
    "--scores",
    type=click.Choice(["model", "calibrated"]),
    default="model",
    show_default=True,
    help="The model's own, or the probabilities that qrank calibrate fitted.",
)
@click.option(
    "--backend",
    help="onnx, openvino-int8, ...  [default: as measured, or what is expected to be the fastest]",
)
@device_option("as measured, or cpu")
@click.option(
    "--compute-dtype", help="fp32, bf16 or fp16.  [default: the fastest that is faithful]"
)
@criteria_options
@click.option(
    "--max-loss",
    type=FiniteFloat(),
    help="Most nDCG@10 that qrank eval may have found a variant to lose against fp32.",
)
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
@click.pass_context
def serve(
    context: click.Context,
    models: tuple[str, ...],
    host: str,
    port: int,
    unix_socket: str | None,
    root_path: str,
    aliases: tuple[str, ...],
    instruction: str | None,
    scores: str,
    backend: str | None,
    device: str | None,
    compute_dtype: str | None,
    policy: Policy,
    min_kendall: float | None,
    max_loss: float | None,
    profile: Profile,
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

    MODEL is a bundled name, a bundle's folder or a hub id, "mini" by default. Requests choose one
    by its NAME; those that name none get the first. Where one model is served, every name stands
    for it. Clients of TEI, Jina, Cohere, vLLM, llama.cpp and Ollama work as they are; /docs
    describes all there is.

    \b
      qrank serve
      qrank serve mini legal=./my-bundle --port 8080
      qrank serve --host unix:/run/qrank.sock
      curl localhost:8000/rerank -H 'content-type: application/json' \\
        -d '{"query": "which planet is red?", "texts": ["mars", "bread"]}'
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        need(module)
    from qrank.serve.app import build
    from qrank.serve.guard import read_keys
    from qrank.serve.listening import UNIX, listen
    from qrank.serve.request import Limits
    from qrank.serve.server import run, server

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
    with ExitStack() as opened:
        listening = opened.enter_context(listen(host, port))
        served: dict[str, Reranker] = {}
        for model in models or (DEFAULT,):
            name, source = _named(model)
            reranker = opened.enter_context(
                Reranker(
                    source,
                    backend=backend,
                    device=device,
                    threads=threads,
                    compute_dtype=compute_dtype,
                    max_length=max_length,
                    max_memory=max_memory,
                    policy=policy,
                    min_kendall=min_kendall,
                    max_loss=max_loss,
                    profile=profile,
                    calibrated=scores == "calibrated",
                )
            )
            # A folder is no name to ask for.
            name = name or (reranker.manifest.name if Path(source).is_dir() else source)
            if name in served:
                raise click.UsageError(f"two models are called {name!r}; name one: NAME={source}")
            served[name] = reranker
        urls = listening.addresses("https" if tls_cert else "http")

        def ready() -> None:
            for name, reranker in served.items():
                notice(f"{name} is {reranker.target.name}")
            notice(f"serving at {' and '.join(urls)}")

        if not keys and listening.public:
            notice("anyone who reaches this address can use it: no --api-key-file is given")
        guard = build(
            served,
            limits=limits,
            keys=keys,
            aliases=_aliases(aliases, served),
            instructions=_instructed(served, instruction),
            root=root,
        )
        made = server(
            guard,
            ready=ready,
            drain_seconds=drain_timeout,
            cors=cors_origin,
            certificate=tls_cert,
            key=tls_key,
        )
        run(made, listening.sockets)


def _named(model: str) -> tuple[str, str]:
    """[NAME=]MODEL -> NAME, or "", and MODEL: a path may hold an equals sign, a name does not."""
    name, equals, source = model.partition("=")
    if not equals or Path(model).exists() or name.startswith(("/", ".", "~")):
        return "", model
    return name, source


def _aliases(given: Iterable[str], served: Mapping[str, Reranker]) -> dict[str, str]:
    found = {}
    for pair in given:
        alias, _, name = pair.partition("=")
        if not alias or name not in served:
            raise click.UsageError(
                f"--alias {pair!r}: give ALIAS=NAME, where NAME is one of: {', '.join(served)}"
            )
        if alias in served or alias in found:
            raise click.UsageError(f"--alias {pair!r}: {alias!r} is the name of a model already")
        found[alias] = name
    return found


def _instructed(served: Mapping[str, Reranker], instruction: str | None) -> dict[str, str]:
    """The instruction for each model that takes one."""
    if instruction is None:
        return {}
    found: dict[str, str] = {}
    refusal: InputError | None = None
    for name, reranker in served.items():
        try:
            reranker.prepare([("", "")], instruction)
        except InputError as error:
            refusal = error
        else:
            found[name] = instruction
    if not found and refusal is not None:
        raise InputError(f"--instruction: {refusal}")
    return found
