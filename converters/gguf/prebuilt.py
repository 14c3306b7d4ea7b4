"""A prebuilt GGUF file -> one that qrank scores correctly, or the reason why llama.cpp cannot.

The file is not changed. A decoder's head is stored next to it as `head.npy`: from the file's own
score rows, or from the labels' rows of its output matrix.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.backends.gguf import FILE, TYPE_STRIDE
from qrank.backends.gguf_decoder import HEAD
from qrank.bundle.family import label_row
from qrank.bundle.sequences import Floats
from qrank.converters.checkpoint.configuration import make_settings, read_config
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.gguf.layouts import Layout
from qrank.converters.gguf.tensors import token_types
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

MODULES = ("transformers", "gguf", "llama_cpp")
"""Packages needed to import and run a file."""

_SCORE = "cls.output.weight"
_WORDS = "token_embd.weight"


def precision(path: Path) -> str:
    """A file's precision by llama.cpp's name of its file type (`q4_k_m`), or its commonest type.

    Raises:
        ConversionError: gguf cannot read the file.
    """
    gguf, reader = need("gguf"), _read(path)
    if (field := reader.get_field("general.file_type")) is not None:
        known = {kind.value: kind.name for kind in gguf.LlamaFileType}
        name: str = known.get(int(field.contents()), "")
        if name.startswith(("MOSTLY_", "ALL_")):
            return name.partition("_")[2].lower()
    numbers: Counter[str] = Counter()
    for tensor in reader.tensors:
        numbers[tensor.tensor_type.name] += int(tensor.n_elements)
    return numbers.most_common(1)[0][0].lower()


def import_file(path: Path, checkpoint: Checkpoint, folder: Path) -> str:
    """Copy the file as `model.gguf` into a folder, with a decoder's head as `head.npy`.

    Args:
        path: the prebuilt file.
        checkpoint: describes the model.
        folder: exists and is empty.

    Returns:
        The origin of a decoder's head, or "".

    Raises:
        ConversionError: llama.cpp would not score the file like the family; with the reason.
    """
    family, reader = checkpoint.family, _read(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found, layout = _text(reader, "general.architecture"), Layout.of(family.architecture)
    if found != layout.arch:
        raise ConversionError(
            f"{path.name} is of llama.cpp's architecture {found}; {family.architecture} is its "
            f"{layout.arch}: config.json is another model's"
        )
    _check_vocabulary(reader, tensors, checkpoint, path)
    note = ""
    if family.decoder:
        rows, note = _head(reader, tensors, checkpoint, path)
        np.save(folder / HEAD, label_row(rows))
    else:
        _check_encoder(reader, tensors, checkpoint, path)
    shutil.copyfile(path, folder / FILE)
    return note


def _read(path: Path) -> GGUFReader:
    try:
        return need("gguf").GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConversionError(f"gguf cannot read {path}: {error}") from error


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _check_vocabulary(
    reader: GGUFReader, tensors: dict[str, ReaderTensor], checkpoint: Checkpoint, path: Path
) -> None:
    """Check that the file's token ids match the tokenizer's, by the size of the vocabulary."""
    if _WORDS not in tensors:
        raise ConversionError(f"{path.name} holds no {_WORDS}: it is no language model's")
    rows = int(tensors[_WORDS].shape[1])
    wanted = int(read_config(checkpoint.folder)["vocab_size"])
    if rows not in (wanted, wanted * token_types(checkpoint)):
        raise ConversionError(
            f"{path.name} has {rows:,} tokens; config.json says {wanted:,}: they are different "
            "models'"
        )


def _check_encoder(
    reader: GGUFReader, tensors: dict[str, ReaderTensor], checkpoint: Checkpoint, path: Path
) -> None:
    """Check that llama.cpp's own pooling and head match the family.

    Raises:
        ConversionError: they do not.
    """
    family = checkpoint.family
    if _SCORE not in tensors:
        raise ConversionError(
            f"{path.name} holds no score head ({_SCORE}): it gives embeddings, not scores"
        )
    if family.segments is not None and reader.get_field(TYPE_STRIDE) is None:
        raise ConversionError(
            f"{path.name} knows one token type: llama.cpp gives all tokens type 0, and family "
            f"{family.name} needs types {min(family.segments)} and {max(family.segments)}. "
            "Convert the checkpoint itself, whose GGUF file then holds both"
        )
    if "cls.weight" not in tensors:
        raise ConversionError(
            f"{path.name} lacks the head's first layer (cls.weight), as files of llama.cpp's own "
            "converter do: it would score wrongly. Convert the checkpoint itself"
        )
    if Layout.of(family.architecture).arch == "modern-bert":
        field = reader.get_field("modern-bert.classifier.pooling_type")
        kinds = {kind.value: kind.name.lower() for kind in need("gguf").PoolingType}
        pooling = "mean" if field is None else kinds.get(int(field.contents()), "?")
        if pooling != family.pooling:
            raise ConversionError(
                f"{path.name} pools by {pooling}, and config.json says {family.pooling}: it would "
                "score wrongly. Convert the checkpoint itself"
            )


def _head(
    reader: GGUFReader, tensors: dict[str, ReaderTensor], checkpoint: Checkpoint, path: Path
) -> tuple[Floats, str]:
    """The rows of a decoder's score head, in the order of its labels, and a note on the origin."""
    labels = checkpoint.family.labels
    if _SCORE in tensors:
        field = reader.get_field(
            f"{_text(reader, 'general.architecture')}.classifier.output_labels"
        )
        listed = [] if field is None else [str(label) for label in field.contents()]
        names = [checkpoint.tokenizer.decode([label]) for label in labels]
        rows = _rows(tensors[_SCORE], range(_count(tensors[_SCORE])))
        if not labels and len(rows) == 1:
            return rows, f"the head is the file's {_SCORE}"
        if labels and len(rows) == len(listed) and set(names) <= set(listed):
            order = [listed.index(name) for name in names]
            return rows[order], f"the head is the file's {_SCORE}, of {', '.join(names)}"
    if not labels:
        raise ConversionError(
            f"{path.name} holds no score head of one label ({_SCORE}), and {checkpoint.name} has "
            "no labels to read from its output matrix. Convert the checkpoint itself"
        )
    config = make_settings(read_config(checkpoint.folder))
    tied = config.tie_word_embeddings and "output.weight" not in tensors
    name = _WORDS if tied else "output.weight"
    if name not in tensors:
        raise ConversionError(
            f"{path.name} holds neither a score head of the labels ({_SCORE}) nor the output "
            f"matrix ({name}) to take their rows from. Convert the checkpoint itself"
        )
    kind = tensors[name].tensor_type.name
    return _rows(tensors[name], labels), f"the head is of the labels' rows of {name}, in {kind}"


def _count(tensor: ReaderTensor) -> int:
    """Number of rows of a matrix; a vector has one."""
    return int(tensor.shape[1]) if len(tensor.shape) > 1 else 1


def _rows(tensor: ReaderTensor, numbers: Sequence[int]) -> Floats:
    """Some rows of a matrix, dequantized to fp32."""
    data: Any = tensor.data.reshape(_count(tensor), -1)
    rows: Floats = need("gguf").dequantize(data[list(numbers)], tensor.tensor_type)
    return rows.astype(np.float32)
