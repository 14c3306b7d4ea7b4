"""`qrank doctor`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from qrank.cli.common import debug_option
from qrank.cli.spinner import spinner
from qrank.system.version import __version__

_WIDTH = 80


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, to attach to a bug report.")
@debug_option
def doctor(as_json: bool) -> None:
    """Show all backends and devices, and test the present ones.

    Each backend is examined in a separate process, because drivers may hang or crash. A device
    is tested with a matrix product.

    \b
      qrank doctor
      qrank doctor --json > doctor.json
    """
    from qrank.measure.doctor import examine

    with spinner() as progress:
        found = examine(progress)
    if as_json:
        click.echo(json.dumps({"qrank": __version__, **found}, indent=2))
        return
    for line in _lines(found):
        click.echo(line)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    memory = f", {machine['memory'] / 1e9:.0f} GB" if machine["memory"] else ""
    yield f"qrank {__version__} on {machine['system']}"
    yield (
        f"{machine['cpu']}: {machine['processors']} processors, {machine['cores']} cores{memory}"
    )
    sets = ", ".join(machine["instruction_sets"]) or "the system does not tell"
    yield from _wrapped("instruction sets: ", sets)
    if machine["accelerators"]:
        yield from _wrapped("the system shows: ", ", ".join(machine["accelerators"]))
    for backend in found["backends"]:
        yield ""
        yield from _wrapped(f"{backend['name']:10}", backend["version"] or backend["reason"])
        absent = []
        for device in backend["devices"]:
            if not device["present"]:
                absent.append(device["name"])
                continue
            state = {True: "computes", False: "FAILS", None: "found"}[device["computes"]]
            detail = f" ({device['detail']})" if device["detail"] else ""
            yield from _wrapped(f"  {device['name']:10}", state + detail)
        if absent:
            yield from _wrapped(f"  {'not here':10}", ", ".join(absent))
        if backend["advice"]:
            yield from _wrapped(f"  {'to do':10}", backend["advice"])


def _wrapped(head: str, text: str) -> list[str]:
    """Lines of 80 columns or fewer, indented below the first one's text."""
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [
        head.rstrip()
    ]
