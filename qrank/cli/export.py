"""`qrank export`."""

from __future__ import annotations

from pathlib import Path

import click

from qrank.cli.common import debug_option
from qrank.cli.obtain import obtained, revision_option
from qrank.select.obtain import Wanted


@click.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to write.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME",
    help="Variant (onnx-int8) or format (openvino) to export; can be repeated.  [default: all]",
)
@click.option(
    "--card/--no-card",
    default=True,
    show_default=True,
    help="Whether to write a model card, README.md.",
)
@revision_option
@click.option(
    "--force",
    is_flag=True,
    help="Write into a folder that is not empty: replaces the files of an earlier export, and no "
    "others.",
)
@debug_option
def export(
    model: str,
    output: Path,
    variants: tuple[str, ...],
    card: bool,
    revision: str | None,
    force: bool,
) -> None:
    """Write a bundle's variants as files that other programs load.

    sentence-transformers, transformers.js, fastembed, Vespa and text-embeddings-inference load a
    folder with onnx/model_quantized.onnx or openvino/openvino_model_qint8_quantized.xml,
    config.json, and a tokenizer that builds the pair itself. The model card says how, and how close
    the model is to the original. MODEL is a bundled name, a folder or a hub id, of an encoder
    family.

    \b
      qrank export mini --variant onnx -o ./mini-onnx
      qrank export BAAI/bge-reranker-base --variant openvino-int8 -o ./bge
      hf upload OWNER/NAME ./mini-onnx
    """
    from qrank.converters.export import export as run

    bundle = obtained(model, revision, Wanted(variants), whole=False)
    for path in run(bundle, output, variants, card=card, force=force):
        click.echo(path)
