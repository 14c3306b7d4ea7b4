"""The option `--revision`, and the bundle of a command's model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import click

from qrank.bundle.opened import Bundle
from qrank.cli.spinner import spinner
from qrank.reranker import Reranker
from qrank.select.obtain import Wanted, obtain

Command = TypeVar("Command", bound=Callable[..., Any])


def revision_option(command: Command) -> Command:
    """`--revision`: which state of a hub repository is meant."""
    return click.option(
        "--revision",
        help="Branch, tag or commit of a hub repository; or write owner/name@REVISION.",
    )(command)


def obtained(
    model: str, revision: str | None, wanted: Wanted | None = None, *, whole: bool = True
) -> Bundle:
    """A model's bundle, converted first if it must be, with a spinner on a terminal meanwhile.

    Arguments are those of `qrank.select.obtain.obtain`.
    """
    with ExitStack() as stack:
        show: list[Callable[[str], object]] = []

        def progress(step: str) -> None:
            if not show:  # most models are bundles: nothing is to be shown
                show.append(stack.enter_context(spinner()))
            show[0](step)

        return obtain(model, wanted, revision=revision, whole=whole, progress=progress)


def runs_checkpoint(backend: str | None) -> bool:
    """Whether a backend runs checkpoints, which are not converted then."""
    return backend is not None and backend.partition("-")[0] == "torch"


def opened(model: str, revision: str | None, **opening: Any) -> Reranker:
    """Open a command's model with the options of `qrank.cli.common.opening_options`."""
    if runs_checkpoint(opening["backend"]):
        return Reranker(model, revision=revision, **opening)
    return Reranker(located(model, revision, **opening), **opening)


def located(model: str, revision: str | None, **opening: Any) -> Bundle:
    """The bundle that `opened` opens, converted first if it must be."""
    named = () if opening["backend"] is None else (opening["backend"],)
    wanted = Wanted(named, opening["device"], opening.get("family"))
    return obtained(model, revision, wanted, whole=False)
