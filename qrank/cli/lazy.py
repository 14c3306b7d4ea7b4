"""Options whose help lists formats and devices, as the backends declare them.

Listing them imports the backends' modules, so it happens only when help is shown or a format is
given, not at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from qrank.backends import BACKENDS, formats, spec
from qrank.scoring import arguments


class LazyOption(click.Option):
    """An option whose help is computed when it is shown."""

    def __init__(self, *arguments: Any, told: Callable[[], str], **settings: Any) -> None:
        """See click.

        Args:
            arguments: as for `click.Option`.
            told: returns the help.
            settings: as for `click.Option`.
        """
        super().__init__(*arguments, **settings)
        self._told = told

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """See click."""
        self.help = self._told()
        return super().get_help_record(ctx)


class FormatName(click.types.StringParamType):
    """A format to convert checkpoints to, including formats of other packages."""

    name = "format"

    def convert(self, value: Any, *context: Any) -> Any:
        """See click."""
        return self._choice.convert(value, *context)

    def get_metavar(self, *context: Any, **more: Any) -> str | None:
        """See click."""
        return self._choice.get_metavar(*context, **more)

    def shell_complete(self, *context: Any) -> Any:
        """See click."""
        return self._choice.shell_complete(*context)

    @property
    def _choice(self) -> click.Choice[str]:
        return click.Choice(list(formats()))


def made_precisions() -> str:
    """`onnx: int8, fp16, fp32; ...`, the default of each format first."""
    return "; ".join(f"{name}: {', '.join(format.made)}" for name, format in formats().items())


def device_option(default: str) -> Callable[[Any], Any]:
    """The option `--device`.

    Args:
        default: what is used if the option is not given, for the help.
    """
    return click.option(
        "--device",
        cls=LazyOption,
        told=lambda: f"{kinds()}; cuda:1 is the second card.  [default: {default}]",
        callback=lambda ctx, parameter, value: arguments.device(value),
    )


def kinds() -> str:
    """All kinds of devices that qrank's own backends may find."""
    return ", ".join(dict.fromkeys(kind for name in BACKENDS for kind in spec(name).kinds))
