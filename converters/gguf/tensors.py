"""A checkpoint's weights as the tensors of a GGUF file, each read only when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from qrank.bundle.family import Family, label_row
from qrank.bundle.sequences import Floats
from qrank.converters.checkpoint.configuration import auto_class
from qrank.converters.checkpoint.evened_weights import Weights, label_rows
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.gguf import gated_delta
from qrank.converters.gguf.layouts import Layout, rotary_factors
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FLAG = 10
"""How much more than in most channels the token types differ in a flag's."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, not yet read; `pieces` yields some of its rows at a time.

    The writer treats it like an array: something with a size that can be written to a file.
    """

    name: str
    shape: list[int]
    pieces: Callable[[], Iterator[Floats]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """fp32 for small tensors (norms, biases, positions, the head), else fp16."""
        small = len(self.shape) == 1 or self.name.startswith(("cls", "position", "token_types"))
        small |= ".ssm_conv1d." in self.name
        return np.dtype(np.float32 if small else np.float16)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tofile(self, file: IO[bytes]) -> None:
        for piece in self.pieces():
            piece.astype(self.dtype, copy=False).tofile(file)


def llama_scores(family: Family) -> bool:
    """Whether llama.cpp itself scores a decoder: only Qwen3's, as a softmax over two labels."""
    return family.architecture == "Qwen3ForCausalLM" and len(family.labels) == 2


def token_types(checkpoint: Checkpoint) -> int:
    """Number of token types that the template uses."""
    return max(checkpoint.family.segments or [0]) + 1


def has_flags(weights: Weights, checkpoint: Checkpoint) -> bool:
    """Whether a model tells its two texts apart by a few channels, which its token types switch.

    In them, the types differ by more than words do, and by ten times more than in most others.
    """
    if token_types(checkpoint) < 2:
        return False
    (words,) = (name for name in weights.shapes if name.endswith("word_embeddings.weight"))
    (types,) = weights.rows(_types_beside(words))
    shift = np.abs(types[1] - types[0])
    squares = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in weights.rows(words))
    usual = math.sqrt(squares / math.prod(weights.shapes[words]))
    return bool(shift.max() > max(usual, _FLAG * np.median(shift)))


def _types_beside(words: str) -> str:
    return words.replace("word_embeddings", "token_type_embeddings")


def tensors_of(
    weights: Weights, config: PretrainedConfig, layout: Layout, checkpoint: Checkpoint
) -> Iterator[Tensor]:
    """The file's tensors: those that transformers reads, ignoring others in the checkpoint."""
    torch = need("torch")
    with torch.device("meta"):
        model = auto_class(config.to_dict()).from_config(config, trust_remote_code=False)
    tensor_name = layout.tensor_names(config.num_hidden_layers)
    unmapped = []
    for name, _ in model.named_parameters():
        module, _, parameter = name.rpartition(".")
        if module in layout.head:
            continue
        if name not in weights.shapes:
            raise ConversionError(f"{checkpoint.folder} has no weight {name}")
        if layout.gated_delta and gated_delta.MODULE in name:
            shape = [size for size in weights.shapes[name] if size > 1]
            load = partial(gated_delta.stored, name, weights.rows, config)
            yield Tensor(gated_delta.tensor_name(name, tensor_name), shape, load)
            continue
        theirs = tensor_name(module)
        if theirs is None or (layout.arch == "modern-bert" and _is_extra_bias(theirs, parameter)):
            unmapped.append(name)
            continue
        shape, load = list(weights.shapes[name]), partial(weights.rows, name)
        if theirs == "position_embd":
            first = layout.unread(config)
            shape[0] -= first
            load = partial(weights.rows, name, first)
        elif theirs == "token_embd" and (types := token_types(checkpoint)) > 1:
            shape[0] *= types
            load = partial(_shifted, weights, name, types)
        elif theirs == "cls.output" and (classes := checkpoint.family.classes):
            shape[0] = 1
            load = partial(_difference, weights, name, classes)
        elif layout.norms_minus_one and theirs.endswith("norm"):
            load = partial(_plus_one, weights, name)
        elif layout.interleaved_rope and theirs.endswith(("attn_q", "attn_k")):
            queries = theirs.endswith("attn_q")
            heads = config.num_attention_heads if queries else config.num_key_value_heads
            load = partial(_interleaved, weights, name, heads)
        yield Tensor(f"{theirs}.{parameter}", shape, load)
    if layout.head and (factors := rotary_factors(config)) is not None:
        yield Tensor("rope_freqs.weight", list(factors.shape), lambda: iter([factors]))
    if llama_scores(checkpoint.family):
        rows = label_rows(weights, config, checkpoint.family)
        yield Tensor("cls.output.weight", list(rows.shape), lambda: iter([rows]))
    if unmapped:
        raise ConversionError(f"llama.cpp's {layout.arch} has no place for: {', '.join(unmapped)}")


def _is_extra_bias(theirs: str, parameter: str) -> bool:
    """Whether llama.cpp's ModernBERT lacks this bias: it only knows the classifier's."""
    return parameter == "bias" and theirs != "cls.output"


def _plus_one(weights: Weights, name: str) -> Iterator[Floats]:
    """A norm's weights as llama.cpp expects them; the checkpoint stores them minus 1."""
    for rows in weights.rows(name):
        yield rows + 1


def _difference(weights: Weights, name: str, classes: tuple[int, ...]) -> Iterator[Floats]:
    """A score head's rows, or biases, of two labels as those of one."""
    rows = np.concatenate(list(weights.rows(name)))
    yield label_row(rows[list(classes)])[None]


def _interleaved(weights: Weights, name: str, heads: int) -> Iterator[Floats]:
    """Rows of each head, reordered so that two that are rotated together are adjacent."""
    rows = np.concatenate(list(weights.rows(name)))
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    yield halves.swapaxes(1, 2).reshape(rows.shape)


def _shifted(weights: Weights, name: str, types: int) -> Iterator[Floats]:
    """The vocabulary once per token type; llama.cpp adds type 0 itself."""
    (shifts,) = weights.rows(_types_beside(name))
    for number in range(types):
        for words in weights.rows(name):
            yield words + (shifts[number] - shifts[0])
