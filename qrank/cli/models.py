"""`qrank models` and `qrank inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import click

from qrank.bundle.locate import bundled, locate
from qrank.bundle.manifest import Manifest, Variant
from qrank.cli.common import debug_option, megabytes

_NAME = 20
"""Letters of a file's name that a table shows."""


@click.command()
@debug_option
def models() -> None:
    """List the bundled models, and the families that can be converted."""
    from qrank.converters.sources import families

    click.echo("Bundles")
    for name in bundled():
        manifest = locate(name).manifest
        for variant in manifest.variants.values():
            click.echo(
                f"  {name:18} {manifest.family.name}, {variant.name}, {megabytes(variant.bytes)}"
            )
    click.echo("Families")
    for name, about in families().items():
        click.echo(f"  {name:18} {about}")


@click.command()
@click.argument("bundle")
@click.option("--verify", is_flag=True, help="Check the hash of every file.")
@debug_option
def inspect(bundle: str, verify: bool) -> None:
    """Show what a bundle's manifest says: origin, sizes, fidelity.

    BUNDLE is a bundled name, a folder or a hub id. Variants of a bundle on the hub are downloaded
    when they first run.
    """
    located = locate(bundle, whole=False)
    manifest = located.manifest
    family, source = manifest.family, manifest.source
    facts = {
        "name": manifest.name,
        "source": source.id + (f" at {source.revision}" if source.revision else ""),
        "fingerprint": source.fingerprint,
        "family": f"{family.name} ({family.architecture})",
        "limit": f"{family.max_length} tokens",
        "activation": family.activation,
        "reference": manifest.probes.reference,
        "probes": f"{len(manifest.probes.work)} pairs of {manifest.probes.work.lengths.min()} to "
        f"{manifest.probes.work.lengths.max()} tokens",
        "digest": manifest.digest,
    }
    for name, value in facts.items():
        click.echo(f"{name:12} {value}")
    click.echo()
    for line in (*fidelity_lines(manifest.variants.values()), *verification_note(manifest)):
        click.echo(line)
    if verify:
        absent = [v for v in manifest.variants.values() if located.on_hub_only(v)]
        files = dict(manifest.files)
        for variant in manifest.variants.values():
            if variant not in absent:
                files |= variant.files
        located.check(files, always_hash=True)
        click.echo(f"\nall {len(files)} files are as the manifest says")
        if absent:
            click.echo(f"not downloaded yet: {', '.join(variant.name for variant in absent)}")


def fidelity_lines(variants: Iterable[Variant]) -> Iterator[str]:
    """Size, fidelity and agreement of variants: two tables of 80 columns or fewer, and notes."""
    variants = list(variants)
    width = max(len(name) for name in ["variant", *(variant.name for variant in variants)])
    yield (
        f"{'variant':{width}}{'size':>10}{'max |Δlogit|':>15}"
        f"{'of spread':>11}{'Spearman':>10}{'Kendall':>9}"
    )
    for variant in variants:
        f = variant.fidelity
        share = f.max_abs / f.spread if f.spread else 0.0
        yield (
            f"{variant.name:{width}}{megabytes(variant.bytes):>10}{f.max_abs:>15.2g}"
            f"{share:>11.2%}{f.spearman:>10.4f}{f.kendall:>9.4f}"
        )
    yield from _ranking_lines(variants, width)
    for variant in variants:
        if variant.note:
            yield f"{variant.name}: {variant.note}"


def _ranking_lines(variants: Sequence[Variant], width: int) -> Iterator[str]:
    """How far variants rank like the original, for those that were compared."""
    ranked = {v.name: v.ranking for v in variants if v.ranking is not None}
    if not ranked:
        return
    yield ""
    yield f"{'rankings':{width}}{'nDCG':>10}{'top 10':>10}{'Kendall':>10}{'queries':>9}  of"
    for name, found in ranked.items():
        yield (
            f"{name:{width}}{found.ndcg:>10.4f}{found.top10:>10.1%}{found.kendall:>10.4f}"
            f"{found.queries:>9}  {found.data[:_NAME]}"
        )


def verification_note(manifest: Manifest) -> Iterator[str]:
    """A warning for a bundle that was not compared with the original."""
    if not manifest.probes.verified:
        yield "self-consistent, not verified: the figures compare a prebuilt model with itself."
        yield "What it is to the original, --reference CHECKPOINT tells when it is converted."
