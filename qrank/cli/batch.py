"""`qrank batch`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click

from qrank.cli.common import InputFile, debug_option, notice
from qrank.cli.served import open_served, served_options
from qrank.errors import QrankError
from qrank.system.disk import cannot_write
from qrank.system.textfiles import TextFile

_ELSEWHERE = "name another --output-file"


@click.command()
@click.option(
    "-i", "--input-file", type=InputFile(), required=True, help="Requests: JSONL; - is stdin."
)
@click.option(
    "-o",
    "--output-file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    help="Answers: JSONL; - is stdout. A file appears when all requests are answered.",
)
@served_options
@debug_option
def batch(input_file: Path, output_file: Path, models: tuple[str, ...], **serving: Any) -> None:
    """Answer a file of rerank requests, without a server.

    Answers are those of qrank serve. The format is that of OpenAI's Batch API and of vllm
    run-batch. Each line of the input is a request {"custom_id", "method": "POST", "url", "body"} to
    one of the paths of qrank serve. Each line of the output has the answer to the same line of the
    input, or its error.

    \b
      qrank batch -i requests.jsonl -o answers.jsonl
      qrank batch -i - -o - legal=./my-bundle < requests.jsonl
    """
    with ExitStack() as opened:
        # Before a model is loaded, because these fail more often.
        lines = opened.enter_context(TextFile(input_file))
        out = opened.enter_context(_written(output_file))
        served, settings = open_served(opened, models, **serving)
        from qrank.serve.app import build
        from qrank.serve.request import Limits

        guard = build(served, limits=Limits.unlimited(), **settings)
        total, failed = asyncio.run(_run(guard, lines, out))
        if guard.failed:
            raise QrankError("a queue of the server failed; the log above says why")
    if failed:
        notice(f"{failed} of {total} requests failed; their lines have an error")


async def _run(app: Any, lines: TextFile, out: IO[str]) -> tuple[int, int]:
    """Write the answers; return the number of requests, and of those that failed."""
    from qrank.serve.batch import answers

    total = failed = 0
    async for answer in answers(app, lines.name, lines):
        out.write(json.dumps(answer) + "\n")
        total += 1
        failed += answer["error"] is not None
    return total, failed


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """A text file to write, which appears under its name if the block ends without an error."""
    if str(path) == "-":
        yield sys.stdout
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except OSError as error:
        # One from writing has no file name.
        raise error if error.filename else cannot_write(error, part, _ELSEWHERE) from error
    finally:
        part.unlink(missing_ok=True)
