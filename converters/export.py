"""Write variants of a bundle in the layout of the hub that other programs load.

    FOLDER/
      config.json tokenizer.json tokenizer_config.json special_tokens_map.json README.md
      onnx/model_quantized.onnx                        transformers.js', optimum's names
      openvino/openvino_model_qint8_quantized.xml      sentence-transformers' names

An encoder's graph has the usual inputs and output already. Integer weights become unsigned
(`exported_graph.py`); all else is copied.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrank.bundle.description import Description
from qrank.bundle.manifest import Manifest, Variant
from qrank.bundle.opened import Bundle
from qrank.converters.exported_card import Exported, model_card
from qrank.converters.exported_config import MARK, config_json, special_tokens, tokenizer_config
from qrank.converters.exported_graph import write_graph
from qrank.converters.exported_tokenizer import check, whole_tokenizer
from qrank.converters.publish import check_folder, disks_explained, workshop
from qrank.errors import ConversionError, InputError

log = logging.getLogger("qrank")

NAMES = {
    "onnx-fp32": "onnx/model.onnx",
    "onnx-fp16": "onnx/model_fp16.onnx",
    "onnx-bf16": "onnx/model_bf16.onnx",
    "onnx-int8": "onnx/model_quantized.onnx",
    "onnx-int4": "onnx/model_q4.onnx",
    "openvino-fp32": "openvino/openvino_model.xml",
    "openvino-fp16": "openvino/openvino_model_fp16.xml",
    "openvino-bf16": "openvino/openvino_model_bf16.xml",
    "openvino-int8": "openvino/openvino_model_qint8_quantized.xml",
    "openvino-int8-w8a8": "openvino/openvino_model_qint8_w8a8_quantized.xml",
    "openvino-int4": "openvino/openvino_model_qint4_quantized.xml",
}
"""Variant -> the graph's place in the layout."""

_CARD = "README.md"
_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(
    bundle: Bundle,
    folder: Path,
    variants: Sequence[str] = (),
    *,
    card: bool = True,
    force: bool = False,
) -> list[Path]:
    """Write variants in the layout that other programs load.

    Args:
        bundle: a bundle of an encoder family; missing files are downloaded.
        folder: written as a whole or not at all.
        variants: names of variants or formats; empty: every variant with a place in the layout.
        card: also write a model card, README.md.
        force: `folder` may hold something: the files of an earlier export are replaced, all others
            stay.

    Returns:
        The files written.

    Raises:
        ConversionError: the model or a variant has no place in the layout, with what to use
            instead; or `folder` cannot be written.
        InputError: the bundle has no variant of that name.
        BundleError: a file of the bundle is damaged.
    """
    manifest = bundle.manifest
    description = _described(manifest)
    chosen = _chosen(manifest, variants)
    target = folder.absolute()

    def replaced(folder: Path) -> list[str]:
        return _earlier_files(folder, card)

    with disks_explained(target):
        check_folder(target, bundle.folder, replaced, force=force)
        bundle.check(manifest.files)
        for variant in chosen:
            bundle.provide(variant)
    with disks_explained(target), workshop(target) as shop:
        # Another run may have written here meanwhile.
        check_folder(target, bundle.folder, replaced, force=force)
        exported = [_copy(bundle, variant, shop.new) for variant in chosen]
        text = _describe(bundle, description, shop.new)
        if card:
            (shop.new / _CARD).write_text(
                model_card(manifest, description, text, exported), "utf-8"
            )
        written = sorted(
            path.relative_to(shop.new) for path in shop.new.rglob("*") if path.is_file()
        )
        shop.publish_files(replaced(target))
    return [folder / name for name in written]


def _described(manifest: Manifest) -> Description:
    """What is exported beside the graph.

    Raises:
        ConversionError: other programs cannot compute the model's scores, or the bundle does not
            know what they need.
    """
    family = manifest.family
    serve = f"serve it with qrank (qrank serve {manifest.name})"
    if not family.pair:
        kind = (
            "a causal model that scores a prompt at its last token"
            if family.decoder
            else "a model that reads query and document inside a prompt"
        )
        raise ConversionError(
            f"{manifest.name} (family {family.name}) is {kind}, which no program that loads this "
            f"layout fills in: {serve}, or give llama.cpp a GGUF file where docs/bundle.md says "
            "that it scores the same"
        )
    if family.temperature != 1:
        raise ConversionError(
            f"{manifest.name} divides its logits by {family.temperature:g}, which no program that "
            f"loads this layout does: {serve}"
        )
    if manifest.description is None:
        raise ConversionError(
            f"the bundle {manifest.name} was made by an earlier qrank and does not know its "
            "config.json: convert the model again, with --force"
        )
    return manifest.description


def _chosen(manifest: Manifest, names: Sequence[str]) -> list[Variant]:
    """The variants to export.

    Raises:
        InputError: there is no variant of a name.
        ConversionError: one has no place in the layout, or none has.
    """
    every = list(manifest.variants.values())
    if unknown := [n for n in names if not any(n in (v.format, v.name) for v in every)]:
        raise InputError(
            f"the bundle {manifest.name} has no variant {unknown[0]!r}; it has: "
            f"{', '.join(manifest.variants)}"
        )
    meant = [v for v in every if not names or v.format in names or v.name in names]
    outside = [variant for variant in meant if variant.name not in NAMES]
    if outside and (names or len(outside) == len(meant)):
        raise ConversionError(_no_place(outside[0]))
    for variant in outside:
        log.warning("%s is left out: %s", variant.name, _no_place(variant))
    return [variant for variant in meant if variant.name in NAMES]


def _no_place(variant: Variant) -> str:
    file = next(iter(variant.files))
    if variant.format == "gguf":
        return (
            f"the layout has no place for {variant.name}. Its file, {file} in the bundle, is what "
            "llama.cpp loads: docs/bundle.md says for which models it scores the same"
        )
    return f"the layout has no place for {variant.name}; it has places for {', '.join(NAMES)}"


def _earlier_files(folder: Path, card: bool) -> list[str]:
    """The files of an earlier export in a folder.

    Raises:
        ConversionError: there are such files, and they are of something else.
    """
    patterns = [*_TEXTS, "onnx/model*.onnx", "onnx/model*.onnx_data"]
    patterns += ["openvino/openvino_model*.xml", "openvino/openvino_model*.bin"]
    patterns += [_CARD] if card else []
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    found = sorted(path.relative_to(folder).as_posix() for path in paths)
    if found and not _is_exported(folder):
        raise ConversionError(
            f"{folder} holds {found[0]}, which no export wrote: its config.json has no {MARK}. "
            "Name another folder with -o, or remove the file"
        )
    return found


def _is_exported(folder: Path) -> bool:
    """Whether a folder's config.json is that of an export."""
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and MARK in content


def _copy(bundle: Bundle, variant: Variant, folder: Path) -> Exported:
    """Copy a variant's graph and weights to their places."""
    place = NAMES[variant.name]
    graph = folder / place
    graph.parent.mkdir(exist_ok=True)
    sources = {name.partition("/")[2]: bundle.folder / name for name in variant.files}
    if variant.format == "openvino":
        shutil.copyfile(sources["model.xml"], graph)
        shutil.copyfile(sources["model.bin"], graph.with_suffix(".bin"))
    else:
        quantized = variant.precision.startswith("int")
        write_graph(sources["model.onnx"], graph, quantized=quantized)
    return Exported(variant, place)


def _describe(bundle: Bundle, description: Description, folder: Path) -> dict[str, Any]:
    """Write the tokenizer and the configuration; return the tokenizer's content.

    Raises:
        ConversionError: the tokenizer does not read pairs as qrank does.
    """
    family = bundle.manifest.family
    text_only = json.loads(bundle.tokenizer.read_text("utf-8"))
    tokenizer = whole_tokenizer(text_only, family, description)
    check(tokenizer, bundle.tokenizer, family)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    texts = (
        config_json(family, description),
        content,
        tokenizer_config(family, description, content),
        special_tokens(description),
    )
    for name, made in zip(_TEXTS, texts, strict=True):
        text = json.dumps(made, ensure_ascii=False, indent=None if made is content else 2)
        (folder / name).write_text(text + "\n", "utf-8")
    return content
