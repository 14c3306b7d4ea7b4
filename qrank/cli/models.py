"""`qrank models` and `qrank inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from qrank.bundle import converted, hub_cache
from qrank.bundle.locate import bundled, locate
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.opened import Bundle
from qrank.cli.common import debug_option, megabytes, notice
from qrank.cli.obtain import revision_option
from qrank.cli.spinner import spinner
from qrank.errors import BundleError, InputError

_NAME = 20
"""Letters of a file's name that a table shows."""


@click.command()
@click.option(
    "--remove",
    multiple=True,
    metavar="NAME",
    help="Delete this converted or downloaded bundle, named as in the list; can be repeated.",
)
@debug_option
def models(remove: tuple[str, ...]) -> None:
    """List the models on this machine, and the known families.

    A checkpoint's hub id is converted on first use; the bundle is stored in your data folder
    ($QRANK_DATA, or the platform's) and stays as it is when the branch moves on: remove it, and the
    next use converts what is there then. Bundles of the hub are stored in the hub's cache
    (HF_HOME). Bundles that you wrote with qrank convert are where you put them.

    \b
      qrank models
      qrank models --remove BAAI/bge-reranker-base
    """
    if remove:
        for name in remove:
            _remove(name)
        return
    from qrank.converters.sources import families

    click.echo("Bundled with qrank")
    for name, folder in bundled().items():
        _list(name, folder)
    if ours := converted.converted():
        click.echo(f"Converted on this machine, in {next(iter(ours.values())).parent}")
        for name, folder in ours.items():
            _list(name, folder)
    if theirs := hub_cache.cached():
        click.echo(f"Downloaded from the hub, in {theirs[0].cache}")
        for each in theirs:
            _list(each.name, each.folder)
    click.echo("Families")
    for name, about in families().items():
        click.echo(f"  {name:18} {about}")


def _list(name: str, folder: Path) -> None:
    """Print a line for each variant of a bundle."""
    try:
        bundle = Bundle.load(folder)
    except BundleError as error:
        click.echo(f"  {name:28} damaged: {error}")
        return
    source = bundle.manifest.source
    commit = f", of {source.revision[:8]}" if source.revision else ""
    for variant in bundle.manifest.variants.values():
        size = "on the hub" if bundle.on_hub_only(variant) else megabytes(variant.bytes)
        family = f"{bundle.manifest.family.name}{commit}"
        click.echo(f"  {name:28} {variant.name:18}{size:>11}  {family}")
        name = ""


def _remove(name: str) -> None:
    """Remove a bundle from the data folder or from the hub's cache."""
    if name in bundled():
        raise InputError(f"{name} comes with qrank and is not removed")
    if name in converted.converted():
        converted.remove(name)
        repository = name.partition("@")[0]
        if left := hub_cache.size(repository):
            notice(
                f"the hub's cache still holds the checkpoint, {megabytes(left)}; to remove it: "
                f"hf cache rm model/{repository}"
            )
    else:
        hub_cache.remove(name)
    click.echo(f"removed {name}")


@click.command()
@click.argument("bundle")
@revision_option
@click.option("--verify", is_flag=True, help="Check the hash of every file.")
@debug_option
def inspect(bundle: str, revision: str | None, verify: bool) -> None:
    """Show what a bundle's manifest says: origin, sizes, fidelity.

    BUNDLE is a bundled name, a folder or a hub id. Variants of a bundle on the hub are downloaded
    when they first run.

    \b
      qrank inspect mini
      qrank inspect my-bundle --verify
    """
    located = locate(bundle, revision=revision, whole=False)
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
        with spinner() as progress:
            progress(f"hashing {len(files)} files")
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
