"""`qrank doctor`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qrank.bundle.locate import DEFAULT
from qrank.cli.common import debug_option
from qrank.cli.obtain import obtained
from qrank.cli.spinner import spinner
from qrank.errors import InputError
from qrank.system.disk import cannot_write
from qrank.system.paths import write_atomically
from qrank.system.version import __version__

_WIDTH = 80

_ELSEWHERE = "--report names another place"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, to attach to a bug report.")
@click.option(
    "--report",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Check every target of a model against its probes, and write all that was found to this "
    "JSON file. It has no names, folders or variables of yours.",
)
@click.option("-m", "--model", help=f"For --report: bundle to check.  [default: {DEFAULT}]")
@click.option("--tune", is_flag=True, help="For --report: measure speeds first, as qrank tune.")
@debug_option
def doctor(as_json: bool, file: Path | None, model: str | None, tune: bool) -> None:
    """Show all backends and devices, and test the present ones.

    Each backend is examined in a separate process, because drivers may hang or crash. A device
    is tested with a matrix product. With --report, every variant of a model runs on every device,
    in every data type that it can compute in.

    \b
      qrank doctor
      qrank doctor --json > doctor.json
      qrank doctor --report report.json -m my-bundle
    """
    if file is not None:
        if as_json:
            raise click.UsageError("--report writes JSON to its file: leave out --json")
        _report(file, model or DEFAULT, tune)
        return
    if model is not None or tune:
        raise click.UsageError("--model and --tune are for --report FILE")
    from qrank.measure.doctor import examine

    with spinner() as progress:
        found = examine(progress)
    if as_json:
        click.echo(json.dumps({"qrank": __version__, **found}, indent=2))
        return
    for line in _lines(found):
        click.echo(line)


def _report(file: Path, model: str, tuned: bool) -> None:
    """Write a report, and print what it says of the targets."""
    import tempfile  # slow to import, and rarely needed

    from qrank.measure.report import NO_DEVICE, report

    # Before minutes of work.
    if not file.parent.is_dir():
        raise InputError(f"no folder {file.parent} for the report")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise cannot_write(error, file, _ELSEWHERE) from error
    bundle = obtained(model, None)
    with spinner() as progress:
        made = report(bundle, tuned=tuned, progress=progress)
    try:
        write_atomically(file, json.dumps(made, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise cannot_write(error, file, _ELSEWHERE) from error
    shown = [target for target in made["targets"] if target["reason"] != NO_DEVICE]
    width = max((len(_name(target)) for target in shown), default=0)
    for target in shown:
        said = target["reason"] or (
            f"max |Δlogit| {target['max_abs']:.4g} of {target['allowed']:.4g}, "
            f"tau {target['kendall']:.3f}"
        )
        for line in _wrapped(f"{_name(target):{width}}  {target['result']:8}  ", said):
            click.echo(line)
    if rest := [target["target"] for target in made["targets"] if target not in shown]:
        for line in _wrapped(f"{NO_DEVICE}: ", ", ".join(rest)):
            click.echo(line)
    click.echo(f"\n{file} is written. Read it before you send it.")


def _name(target: dict[str, Any]) -> str:
    return f"{target['target']} {target['compute_dtype'] or ''}".rstrip()


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
    indent = " " * len(head)
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
    )
    return lines or [head.rstrip()]
