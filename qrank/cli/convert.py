"""`qrank convert`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import click

from qrank.bundle.agreement import LEAST
from qrank.cli.common import FiniteRange, InputFile, debug_option, notice
from qrank.cli.lazy import FormatName, LazyOption, made_precisions
from qrank.cli.models import fidelity_lines, verification_note
from qrank.cli.spinner import spinner
from qrank.errors import ConversionError, FidelityError
from qrank.quality.ranking_data import read_ranking_data


@click.command()
@click.argument("source")
@click.option(
    "--to",
    "formats",
    multiple=True,
    type=FormatName(),
    help="Format to convert to; can be repeated.  [default: all whose packages are installed "
    "(mlx on Macs alone), or those of the prebuilt files]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    cls=LazyOption,
    told=lambda: (
        f"{made_precisions()}. With exactly one --to; repeat for more.  "
        "[default: the first of each]"
    ),
)
@click.option(
    "--calibration",
    type=InputFile(),
    help='JSON lines with "query" and "document" to calibrate on, besides qrank\'s own pairs.',
)
@click.option(
    "--exporter",
    metavar="NAME",
    help="Convert with another program: optimum (optimum-intel, to OpenVINO).",
)
@click.option(
    "--ranking-data",
    nargs=2,
    type=InputFile(),
    metavar="QUERIES DOCUMENTS",
    help="JSONL files with id and text: rankings to prove variants on, instead of qrank's own. "
    "Documents are found by BM25 (extra eval).",
)
@click.option(
    "--min-agreement",
    type=FiniteRange(-1, 1),
    default=LEAST,
    show_default=True,
    help="Least agreement of a variant's rankings with the original's: nDCG@10, with the "
    "original's scores as gains.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The bundle's folder.  [default: ./NAME-qrank]",
)
@click.option(
    "--reference",
    metavar="CHECKPOINT",
    help="Folder or hub id of the original of prebuilt files, to verify them.",
)
@click.option("--family", help="Family card of the checkpoint: a name (qrank models) or *.toml.")
@click.option(
    "--revision", help="Branch, tag or commit of a hub repository; or write owner/name@REVISION."
)
@click.option("--offline", is_flag=True, help="Use only files that were downloaded before.")
@click.option(
    "--force", is_flag=True, help="Replace an existing bundle at the output; touches no other file."
)
@debug_option
@click.pass_context
def convert(
    ctx: click.Context,
    source: str,
    formats: tuple[str, ...],
    precisions: tuple[str, ...],
    calibration: Path | None,
    exporter: str | None,
    ranking_data: tuple[Path, Path] | None,
    min_agreement: float,
    output: Path | None,
    reference: str | None,
    family: str | None,
    revision: str | None,
    offline: bool,
    force: bool,
) -> None:
    """Convert a reranker, and prove that it still ranks the same.

    The result is a bundle. SOURCE is the folder of a checkpoint (config.json, *.safetensors,
    tokenizer) or a hub id. If the output is a bundle of the same checkpoint, missing variants
    are added. Every variant is compared with the original in fp32: its logits on probe pairs,
    and its rankings of passages for queries. A variant that is not faithful is refused and
    reported; the others are kept. The exit code is 0 if the bundle contains everything that
    --to and --precision name, or anything at all if neither is given.

    SOURCE may also be a converted model: an OpenVINO, ONNX or GGUF file, or a folder or hub
    repository of such files, with config.json and the tokenizer. Without --reference the bundle is
    self-consistent, not verified.

    \b
      qrank convert cross-encoder/ms-marco-MiniLM-L6-v2
      qrank convert ./my-reranker --to onnx --precision fp16 -o ./my-bundle
      qrank convert ./their-int8-ov --family qwen3-reranker
    """
    from qrank.converters.convert import convert as run

    if precisions and len(set(formats)) != 1:
        raise click.UsageError("--precision goes with exactly one --to")
    ranking = None if ranking_data is None else read_ranking_data(*ranking_data)
    named = [(f, p) for f in dict.fromkeys(formats) for p in dict.fromkeys(precisions or (None,))]
    with spinner() as progress:
        result = run(
            source,
            named or None,
            output,
            reference=reference,
            family=family,
            revision=revision,
            offline=offline,
            force=force,
            calibration=calibration,
            exporter=exporter,
            ranking=ranking,
            min_agreement=min_agreement,
            progress=progress,
        )
    wanted = [v for v in result.manifest.variants.values() if not formats or v.format in formats]
    for line in fidelity_lines(v for v in wanted if not precisions or v.precision in precisions):
        click.echo(line)
    for line in verification_note(result.manifest):
        click.echo(line)
    folder = _shown(result.folder)
    click.echo(f"{folder} is ready: qrank score -m {folder} -q QUERY FILE")
    for name, error in result.failed.items():
        if ctx.meta.get("qrank.debug"):
            traceback.print_exception(error)
        notice(f"{name} was not made: {error}")
    if named and result.failed:
        unfaithful = any(isinstance(error, FidelityError) for error in result.failed.values())
        sys.exit((FidelityError if unfaithful else ConversionError).exit_code)


def _shown(folder: Path) -> str:
    """The shortest form of a path, relative to the current folder if inside it."""
    here = Path.cwd()
    if folder == here:
        return "."
    return f"./{folder.relative_to(here)}" if folder.is_relative_to(here) else str(folder)
