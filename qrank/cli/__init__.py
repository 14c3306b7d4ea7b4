"""The command line: click commands, one file each, without logic of their own."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from qrank.cli.batch import batch
from qrank.cli.bench import bench
from qrank.cli.cache import cache
from qrank.cli.calibrate import calibrate
from qrank.cli.cascade import cascade
from qrank.cli.common import Group, debug_option
from qrank.cli.convert import convert
from qrank.cli.doctor import doctor
from qrank.cli.evaluate import evaluate
from qrank.cli.export import export
from qrank.cli.models import inspect, models
from qrank.cli.score import score
from qrank.cli.serve import serve
from qrank.cli.tune import tune
from qrank.system.version import __version__


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qrank")
@debug_option
def main() -> None:
    """Rerank documents with a quantized model on this machine.

    \b
      qrank score -q "which planet is red?" passages.txt
      qrank convert cross-encoder/ms-marco-MiniLM-L6-v2

    \b
    Exit codes: 0 done, 1 other, 2 bad input or usage, 3 a package is missing,
    4 no such model, 5 damaged bundle, 6 unsupported checkpoint, 7 backend or
    device, 8 conversion failed, 9 converted model not faithful; 129 the
    terminal was closed, 130 Ctrl-C, 141 the reader of a pipe has gone, 143
    SIGTERM.
    """


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes qrank's commands and options.

    \b
      qrank completion bash >> ~/.bashrc
    """
    script = get_completion_class(shell)
    assert script is not None  # click supports all three shells
    click.echo(script(main, {}, "qrank", "_QRANK_COMPLETE").source())


for command in (
    batch,
    bench,
    cache,
    calibrate,
    cascade,
    convert,
    doctor,
    evaluate,
    export,
    inspect,
    models,
    score,
    serve,
    tune,
):
    main.add_command(command)
