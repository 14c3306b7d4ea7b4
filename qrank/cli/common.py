"""What every command shares: errors as one line, notices on stderr, options that recur."""

from __future__ import annotations

import logging
import math
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from qrank.cli.lazy import device_option
from qrank.cli.streams import see_to_output, standard_streams
from qrank.errors import InputError, QrankError
from qrank.quality.metrics import Difference
from qrank.scoring.arguments import size
from qrank.select.measurements import PROFILES
from qrank.select.selection import POLICIES
from qrank.system.signals import Ended, die_of, signals
from qrank.system.textfiles import STANDARD_INPUT

Command = TypeVar("Command", bound=Callable[..., Any])

_LEAVE_MORE = frozenset({"batch", "calibrate", "convert", "export", "serve", "tune"})
"""Commands whose printed output is not their only result."""


ARGUMENTS = "qrank.arguments"
"""Key of a context's `meta`: the command line's arguments, as given."""


def notice(message: str) -> None:
    """Print a message on stderr, separate from the results."""
    # Not with click.echo: it bypasses rich and would write into a progress bar or spinner.
    sys.stderr.write(f"qrank: {message}\n")
    sys.stderr.flush()


class _Notices(logging.Handler):
    """Prints the library's warnings as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        notice(record.getMessage())


class Group(click.Group):
    """Turns errors and signals into one line on stderr and an exit code."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """See click."""
        try:
            with standard_streams(), signals():
                try:
                    return super().main(*arguments, **options)
                except OSError as error:  # from --help, which invokes no command
                    notice(f"error: {_told(error)}")
                    sys.exit(QrankError.exit_code)
                except Ended as end:
                    if end.number == signal.SIGINT and sys.stderr.isatty():
                        click.echo(err=True)  # end the line: the terminal has written ^C
                    notice(end.message)
                    raise
        except Ended as end:
            die_of(end)
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click."""
        if ctx.parent is None:
            ctx.meta[ARGUMENTS] = list(args)
        _refuse_repeats(self, ctx, args)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See click."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            see_to_output(name not in _LEAVE_MORE)
            if not isinstance(command, Group):  # a group checks its own options
                settings = command.context_settings
                inner = command.context_class(command, parent=ctx, info_name=name, **settings)
                _refuse_repeats(command, inner, rest)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """See click."""
        handler = _Notices(logging.WARNING)
        logging.getLogger("qrank").addHandler(handler)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Ended(signal.SIGINT, str(error)) from None
        except (QrankError, OSError) as error:
            if ctx.meta.get("qrank.debug"):
                traceback.print_exc()
            notice(f"error: {_told(error)}")
            sys.exit(getattr(error, "exit_code", QrankError.exit_code))
        finally:
            logging.getLogger("qrank").removeHandler(handler)


def _told(error: Exception) -> str:
    """An error as one line; an OSError about one file is shown without its number."""
    if isinstance(error, OSError) and error.filename and not error.filename2:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _refuse_repeats(command: click.Command, ctx: click.Context, args: Sequence[str]) -> None:
    """Refuse an option that is given twice; click would silently take the last one."""
    if ctx.resilient_parsing:
        return
    given = command.make_parser(ctx).parse_args(list(args))[2]
    for option, count in Counter(given).items():
        if not isinstance(option, click.Option) or option.multiple or option.count:
            continue
        if count > 1 and not option.is_eager:  # such as --help
            raise click.UsageError(f"{max(option.opts, key=len)} is given twice", ctx)


class InputFile(click.Path):
    """A text file to read, or - for standard input, which can be read only once."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        path = super().convert(value, param, ctx)
        if str(value) != "-":
            return path.absolute() if path == STANDARD_INPUT else path  # ./- is a file
        if ctx is not None:
            if ctx.meta.get("qrank.standard-input"):
                self.fail("standard input can be read only once", param, ctx)
            ctx.meta["qrank.standard-input"] = True
        return path


class FiniteFloat(click.types.FloatParamType):
    """A number other than "nan" and "inf", which comparisons would let pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        return _finite(super().convert(value, param, ctx), self, param, ctx)


class FiniteRange(click.FloatRange):
    """A finite number between bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        return _finite(super().convert(value, param, ctx), self, param, ctx)


def _finite(
    number: float,
    kind: click.types.FloatParamType,
    param: click.Parameter | None,
    ctx: click.Context | None,
) -> float:
    if not math.isfinite(number):
        kind.fail(f"{number} is no finite number", param, ctx)
    return number


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["qrank.debug"] = True


def debug_option(command: Command) -> Command:
    """`--debug`: show where an error was raised."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show the traceback of an error.",
    )(command)


def policy_options(command: Command) -> Command:
    """`--policy` and `--min-kendall`: which of the measured targets to choose."""
    command = click.option(
        "--min-kendall",
        type=FiniteRange(-1, 1),
        help="Lowest accepted Kendall's tau of a target against the original (qrank inspect).",
    )(command)
    return click.option(
        "--policy",
        type=click.Choice(POLICIES),
        default="fastest",
        show_default=True,
        help="How to choose the target.",
    )(command)


def criteria_options(command: Command) -> Command:
    """`--policy`, `--min-kendall` and `--profile`: the criteria for choosing a target."""
    profile = click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        default="passages",
        show_default=True,
        help="Typical workload: single short pairs, 20 passages, or 100 long documents.",
    )
    return policy_options(profile(command))


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Parse a size such as 4G, 512M or 1.5GiB; units are powers of 1024."""
    try:
        return None if value is None else size(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from error


def whole_numbers(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> list[int] | None:
    """Parse 20 or 10,20,50: the callback of an option."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r}: give whole numbers like 20 or 10,20,50")
    return [int(part) for part in parts]


def first_length_option(command: Command) -> Command:
    """`--first-length`: how much the first model of a cascade reads."""
    return click.option(
        "--first-length",
        type=click.IntRange(min=1),
        help="Maximum tokens of a pair for the first of several models.  [default: as for all]",
    )(command)


def memory_option(command: Command) -> Command:
    """`--max-memory`: memory limit for the model and its batches."""
    return click.option(
        "--max-memory",
        metavar="SIZE",
        callback=_bytes,
        help="Memory limit for the model and its batches, by estimate: 512M, 4G.  [default: the "
        "model's size and half of the rest]",
    )(command)


_RUN = (
    device_option("as measured, or cpu"),
    click.option(
        "--compute-dtype", help="fp32, bf16 or fp16.  [default: the fastest faithful one]"
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), help="CPU threads per model.  [default: all]"
    ),
    click.option(
        "--max-length", type=int, help="Maximum tokens of a pair.  [default: the model's limit]"
    ),
)


def run_options(command: Command) -> Command:
    """How a target runs: `--device`, `--compute-dtype`, `--threads` and `--max-length`."""
    for option in reversed(_RUN):
        command = option(command)
    return command


def opening_options(command: Command) -> Command:
    """All options for opening a model; their argument names are those of `Reranker`."""
    backend = click.option(
        "--backend",
        help="onnx, openvino-int8, ...  [default: as measured, or the one expected to be the "
        "fastest]",
    )
    max_loss = click.option(
        "--max-loss",
        type=FiniteFloat(),
        help="Largest accepted loss of nDCG@10 against fp32, as measured by qrank eval.",
    )
    scores = click.option(
        "--scores",
        "calibrated",
        type=click.Choice(["model", "calibrated"]),
        default="model",
        show_default=True,
        callback=lambda ctx, parameter, value: value == "calibrated",
        help="The model's own scores, or probabilities fitted by qrank calibrate.",
    )
    return scores(backend(run_options(criteria_options(max_loss(memory_option(command))))))


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C says that the command continues."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "what was scored is kept, and the same command goes on from there"
        ) from None


def megabytes(size: int) -> str:
    """A number of bytes as text, such as 23.9 MB."""
    return f"{size / 1e6:.1f} MB"


def difference_cells(difference: Difference | None) -> tuple[str, str]:
    """A difference with its margin, and p."""
    if difference is None:
        return "", ""
    margin = "" if difference.margin is None else f" ±{difference.margin:.3f}"
    p = "" if difference.p is None else f"{difference.p:.2g}"
    return f"{difference.mean:+.3f}{margin}", p
