"""Names that `qrank serve` gives its models: [NAME=]MODEL and ALIAS=NAME."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import click


def split_name(model: str) -> tuple[str, str]:
    """[NAME=]MODEL -> NAME, or "", and MODEL: a path may contain an equals sign, a name may not."""
    name, equals, source = model.partition("=")
    if not equals or Path(model).exists() or name.startswith(("/", ".", "~")):
        return "", model
    return name, source


def parse_aliases(given: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """ALIAS=NAME of each --alias -> the names by alias.

    Raises:
        click.UsageError: a name is not served, or an alias is already in use.
    """
    found: dict[str, str] = {}
    for pair in given:
        alias, _, name = pair.partition("=")
        if not alias or name not in names:
            raise click.UsageError(
                f"--alias {pair!r}: give ALIAS=NAME, where NAME is one of: {', '.join(names)}"
            )
        if alias in names or alias in found:
            raise click.UsageError(f"--alias {pair!r}: {alias!r} is the name of a model already")
        found[alias] = name
    return found
