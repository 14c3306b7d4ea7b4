"""`qrank cache`."""

from __future__ import annotations

import click

from qrank.cli.common import debug_option, megabytes
from qrank.system import cache as store
from qrank.system import paths

_ALL = "all"


@click.command()
@click.option(
    "--clear",
    multiple=True,
    type=click.Choice([*store.KINDS, _ALL]),
    help="Delete records of this kind; can be repeated.",
)
@debug_option
def cache(clear: tuple[str, ...]) -> None:
    """Show what qrank has cached on this machine, and clear it.

    Everything here can be computed again: hashes of files, proofs and measurements of targets,
    scores of queries. Calibrations (qrank calibrate) are stored elsewhere.

    \b
      qrank cache
      qrank cache --clear proofs --clear openvino
    """
    for kind in store.KINDS if _ALL in clear else dict.fromkeys(clear):
        store.clear(kind)
    folder = paths.cache_folder()
    if folder is None:
        return  # a notice was already printed
    click.echo(folder)
    width = max(map(len, store.KINDS))
    for kind, found in store.usage().items():
        click.echo(
            f"  {kind:{width}}{found.records:>7}{megabytes(found.bytes):>11}  {store.KINDS[kind]}"
        )
