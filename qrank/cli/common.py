"""What every command shares: errors as one line, notices on stderr, options that recur."""

from __future__ import annotations

import errno
import io
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import click

from qrank.arguments import size
from qrank.errors import InputError, QrankError
from qrank.selection import POLICIES, PROFILES

Command = TypeVar("Command", bound=Callable[..., Any])


def notice(message: str) -> None:
    """Say something on stderr, out of the way of results."""
    click.echo(f"qrank: {message}", err=True)


class _Notices(logging.Handler):
    """Warnings of the library, as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        notice(record.getMessage())


class Group(click.Group):
    """Turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """See click."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Whatever the locale: results are UTF-8, and a lone surrogate is escaped as in JSON.
            encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
            sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
        handler = _Notices(logging.WARNING)
        logging.getLogger("qrank").addHandler(handler)
        try:
            return super().invoke(ctx)
        except (QrankError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise  # the reader has gone: click ends quietly
            if ctx.meta.get("qrank.debug"):
                traceback.print_exc()
            notice(f"error: {error}")
            sys.exit(getattr(error, "exit_code", QrankError.exit_code))
        finally:
            logging.getLogger("qrank").removeHandler(handler)


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["qrank.debug"] = True


def debug_option(command: Command) -> Command:
    """`--debug`: with an error, show where it was raised."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="With an error, show where it was raised.",
    )(command)


def policy_options(command: Command) -> Command:
    """`--policy` and `--min-kendall`: which of measured targets is taken."""
    command = click.option(
        "--min-kendall",
        type=click.FloatRange(-1, 1),
        help="Least Kendall tau against the original that a target may have (qrank inspect).",
    )(command)
    return click.option(
        "--policy",
        type=click.Choice(POLICIES),
        default="fastest",
        show_default=True,
        help="Which target to take.",
    )(command)


def wish_options(command: Command) -> Command:
    """`--policy`, `--min-kendall` and `--profile`: what a target is chosen by."""
    profile = click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        default="passages",
        show_default=True,
        help="What the work is like: single short pairs, 20 passages, 100 long documents.",
    )
    return policy_options(profile(command))


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Sizes as people write them: 4G, 512M, 1.5GiB; powers of 1024."""
    try:
        return None if value is None else size(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from error


def memory_option(command: Command) -> Command:
    """`--max-memory`: what the model and its batches may take."""
    return click.option(
        "--max-memory",
        metavar="SIZE",
        callback=_bytes,
        help="Memory for the model and what it computes at once, estimated: 512M, 4G.  "
        "[default: the model's and half of the rest]",
    )(command)


def megabytes(size: int) -> str:
    """Bytes for people: 23.9 MB."""
    return f"{size / 1e6:.1f} MB"
