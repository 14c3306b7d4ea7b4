"""`qrank tune`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict
from typing import Any

import click

from qrank.bundle.opened import Bundle
from qrank.cli.common import FiniteRange, criteria_options, debug_option, megabytes
from qrank.cli.obtain import obtained, revision_option
from qrank.cli.spinner import spinner
from qrank.select.measurements import PROFILES, Measurement, Profile
from qrank.select.selection import Criteria, Policy, deprioritized, order


@click.command()
@click.argument("bundle")
@revision_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@criteria_options
@click.option(
    "--timeout",
    type=FiniteRange(min=0, min_open=True),
    help="Time limit in seconds for a backend to open or to answer.  [default: ten times what "
    "the others took, more for large files]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def tune(
    bundle: str,
    revision: str | None,
    threads: int | None,
    policy: Policy,
    min_kendall: float | None,
    profile: Profile,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Find the fastest target of a bundle on this machine.

    A target is a variant on a device. Each target runs in a separate process with a time limit,
    must reproduce the bundle's probes, and ranks documents: one of 32 tokens (short), 20 of 128
    (passages), and 100 of 512 (long; fewer for slow models). The table shows pairs per second,
    with the chosen target first. The result is stored: from then on, qrank score and Reranker
    use it.

    \b
      qrank tune my-bundle
      qrank tune my-bundle --min-kendall 0.97
    """
    criteria = Criteria(policy=policy, min_kendall=min_kendall, profile=profile)
    located = obtained(bundle, revision)
    measured = measure(located, threads, timeout)
    last = deprioritized(located.manifest, criteria)
    usable = order(measured, criteria, last)
    rest = [m for m in measured if m not in usable]
    if as_json:
        click.echo(json.dumps([_record(m) for m in usable + rest], indent=2))
    else:
        for line in _lines(usable, rest, last):
            click.echo(line)


def measure(bundle: Bundle, threads: int | None, timeout: float | None) -> list[Measurement]:
    """Measure a bundle's targets, with a spinner on a terminal."""
    from qrank.measure.tuning import tune as run

    with spinner() as progress:
        return run(bundle, threads=threads, timeout=timeout, progress=progress)


def _record(m: Measurement) -> dict[str, Any]:
    return {**asdict(m), **asdict(m.target), "target": m.target.name}


def _lines(
    usable: Sequence[Measurement], rest: Sequence[Measurement], last: Set[str]
) -> Iterator[str]:
    """A table of 80 columns or fewer."""
    width = max([len(m.target.name) for m in usable] + [6])
    yield (
        f"{'target':{width}}"
        + "".join(f"{name:>9}" for name in PROFILES)
        + (f"{'load s':>8}{'size':>10}{'Kendall':>9}")
    )
    for m in usable:
        yield (
            f"{m.target.name:{width}}"
            + "".join(f"{m.speeds[name]:>9.1f}" for name in PROFILES)
            + f"{m.load:>8.1f}{megabytes(m.bytes):>10}{m.kendall:>9.4f}"
        )
        if m.setting:
            yield f"  {m.setting}"
    if usable:
        yield f"chosen: {usable[0].target.name}" + (usable[0].setting and f" ({usable[0].setting})")
    for name in sorted(last & {m.target.variant for m in usable}):
        yield f"taken last: {name}, which loses much, or nobody knows what (qrank eval)"
    for m in rest:
        why = m.reason or "less faithful than asked for"
        yield f"not used: {m.target.name}{m.setting and f' ({m.setting})'}: {why}"
