"""A checkpoint -> a GGUF file that llama.cpp scores as transformers does.

The file is written tensor by tensor from the checkpoint's safetensors, and quantized by llama.cpp
itself. llama.cpp's own converter drops BERT's pooler, and its graph gives every token type 0. Here
the pooler is the head's first layer, and a model of two token types gets its vocabulary twice: the
second time every row is shifted by (type 1 - type 0), and the backend takes ids of type 1 from
there. (Shifted positions would be smaller, but llama.cpp takes consecutive ones only.)
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrank.backends.gguf import FILE, TYPE_STRIDE
from qrank.backends.gguf_decoder import HEAD
from qrank.backends.llama import complaint, library
from qrank.bundle.family import Family
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.configuration import (
    NEMOTRON,
    auto_class,
    read_config,
    transformers_for,
)
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.checkpoint.weights import weight_files
from qrank.converters.gguf.layouts import Layout, describe, rotary_factors
from qrank.converters.gguf.vocabulary import rerank_template, same_ids, write_vocabulary
from qrank.errors import ConversionError
from qrank.system.extras import need
from qrank.system.machine import processors

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

MODULES = ("torch", "transformers", "safetensors", "gguf", "llama_cpp")
"""What converting and verifying takes."""

MEMORY = 0.5
"""The least memory converting takes, in times of the model's size in fp32 (docs/benchmarks.md)."""

_FTYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
"""llama.cpp's enum llama_ftype."""

_BLOCKS = {"q8_0": 32, "q4_k_m": 256}
"""Numbers of a row that share a scale: a row must be a multiple of them."""

_STAND_IN, _STAND_IN_BLOCK = "Q5_1", 32
"""For rows no K-quant fits: nearer to the original than Q5_0, which llama.cpp would take."""

_WORDS, _WORDS_STAND_IN = "token_embd.weight", "Q8_0"
"""The vocabulary then stays at 8 bits, as llama.cpp has it: it holds the token types as well, and a
look-up costs no time. The Kendall tau of `mini` to its original is 0.96, and 0.73 at Q5_1."""

_PIECE = 2**24
"""Numbers read and written at once."""

_BUFFER = 2**27
"""Bytes of weights that the quantizer holds at once."""

Floats = NDArray[np.float32]


def disk(number: float) -> float:
    """Bytes of disk that a weight takes while it is made, if it takes `number` once it is.

    A file in f16 comes first.
    """
    return max(2.0, number)


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.gguf` into a folder, and a decoder's head as `head.npy`.

    Args:
        checkpoint: read from its folder, a tensor at a time.
        precision: one of those that are `made`. The score head stays f32 in each.
        folder: exists and is empty.
        calibration: not looked at.

    Returns:
        What is not as the precision's name says: the types that stand in for it; or "".

    Raises:
        ConversionError: llama.cpp cannot represent the model, or its quantizer fails.
    """
    path = folder / FILE
    matrices = _write(checkpoint, path)
    if precision == "f16":
        return ""
    block = _BLOCKS[precision]
    kinds = _fallback_types(matrices, block)
    plain = path.rename(folder / "f16.gguf")
    _quantize(plain, path, precision, kinds)
    plain.unlink()
    if not kinds:
        return ""
    unfit = sorted({t.shape[-1] for t in matrices if t.shape[-1] % block})
    return (
        f"rows of {', '.join(map(str, unfit))} do not fit {block}: "
        f"{len(kinds)} of {len(matrices)} matrices are {', '.join(sorted(set(kinds.values())))}"
    )


def _fallback_types(matrices: Sequence[_Tensor], block: int) -> dict[str, str]:
    """The types of the matrices that cannot be, or had better not be, what the precision says.

    Where the vocabulary's rows do not fit, hardly any do, and the few that would come to 4 % of the
    file. They keep the others company: left at Q4_K, `mini` has a Kendall tau of 0.64, not 0.96.
    """
    unfit = [t for t in matrices if t.shape[-1] % block]
    if block > _STAND_IN_BLOCK and any(t.name == _WORDS for t in unfit):
        unfit = list(matrices)
    fitting = {_WORDS: _WORDS_STAND_IN}
    return {
        t.name: "F16" if t.shape[-1] % _STAND_IN_BLOCK else fitting.get(t.name, _STAND_IN)
        for t in unfit
    }


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, not yet read; `pieces` gives its rows, some at a time.

    To the writer it is what an array is: something with a size that goes into a file.
    """

    name: str
    shape: list[int]
    pieces: Callable[[], Iterator[Floats]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """fp32 for what is small: norms, biases, positions, the head."""
        small = len(self.shape) == 1 or self.name.startswith(("cls", "position", "token_types"))
        return np.dtype(np.float32 if small else np.float16)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tofile(self, file: IO[bytes]) -> None:
        for piece in self.pieces():
            piece.astype(self.dtype, copy=False).tofile(file)


def _write(checkpoint: Checkpoint, path: Path) -> list[_Tensor]:
    """Write the whole file in f16, and tell what is: the rest is f32."""
    gguf, transformers = need("gguf"), transformers_for(read_config(checkpoint.folder))
    layout = Layout.of(checkpoint.family.architecture)
    config = transformers.AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=False
    )
    layout.check(config, checkpoint.window)
    weights = _Weights(checkpoint.folder)
    writer = gguf.GGUFWriter(path, layout.arch)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    writer.add_file_type(_FTYPES["f16"])
    describe(writer, config, layout, checkpoint.family)
    _describe_vocabulary(writer, config, layout, checkpoint)
    tensors = list(_tensors(weights, config, layout, checkpoint))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()
    if layout.head:
        np.save(path.with_name(HEAD), _head(weights, config, checkpoint.family))
    return [tensor for tensor in tensors if tensor.dtype == np.float16]


def _head(weights: _Weights, config: PretrainedConfig, family: Family) -> Floats:
    """What gives the logit of a pooled hidden state, read from the files; float32 [hidden]."""
    if not family.labels:
        row = weights.row("score.weight", 0)
        return row / np.float32(config.temperature) if config.model_type == NEMOTRON else row
    rows = _label_rows(weights, config, family)
    head: Floats = rows[0] - rows[1:].sum(0)
    return head


def _label_rows(weights: _Weights, config: PretrainedConfig, family: Family) -> Floats:
    """The labels' rows of the output matrix, shape [labels, hidden]."""
    tied = config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return np.stack([weights.row(name, label) for label in family.labels])


def _describe_vocabulary(
    writer: gguf.GGUFWriter, config: PretrainedConfig, layout: Layout, checkpoint: Checkpoint
) -> None:
    """Write the tokenizer where llama.cpp scores rightly by itself, and say so if not."""
    family, pairs = checkpoint.family, probe_pairs(checkpoint.words)
    made = f"Made by qrank from {checkpoint.source.id}. "
    if layout.head and not _serves(family):
        without = "llama.cpp knows no such score head, which lies beside it"
    elif _types(checkpoint) > 1:
        without = "llama.cpp gives every token type 0, and this model reads more"
    elif not same_ids(checkpoint, config.vocab_size, pairs):
        without = "llama.cpp would cut text into other tokens"
    else:
        write_vocabulary(writer, checkpoint, config.vocab_size)
        if family.decoder:
            writer.add_pooling_type(need("gguf").PoolingType.RANK)
            labels = [checkpoint.tokenizer.decode([label]) for label in family.labels]
            writer.add_classifier_output_labels(labels)
            writer.add_chat_template([{"name": "rerank", "template": rerank_template(checkpoint)}])
        scores = "scores, as sigmoids" if family.decoder else "scores, as logits"
        writer.add_description(f"{made}llama-server --rerank gives the same {scores}")
        return
    # Without a vocabulary, other programs refuse the file instead of scoring wrongly.
    writer.add_description(f"{made}For qrank alone: {without}")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size * _types(checkpoint))
    writer.add_uint32(TYPE_STRIDE, config.vocab_size)


def _serves(family: Family) -> bool:
    """Whether llama.cpp scores a decoder itself: Qwen3's it does, as a softmax over two labels."""
    return family.architecture == "Qwen3ForCausalLM" and len(family.labels) == 2


def _types(checkpoint: Checkpoint) -> int:
    """Token types that the template uses."""
    return max(checkpoint.family.segments or [0]) + 1


class _Weights:
    """A checkpoint's safetensors, read some rows at a time.

    A file is opened anew each time: what was read of an open one stays in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._open = need("safetensors").safe_open
        # Before 2019, layer norms had gamma and beta.
        old = {"gamma": "weight", "beta": "bias"}
        self._places = {}
        self.shapes: dict[str, list[int]] = {}
        for path in weight_files(folder, str(folder)):
            with self._open(path, "pt") as file:
                for stored in file.keys():  # noqa: SIM118 (no mapping)
                    module, _, parameter = stored.rpartition(".")
                    name = f"{module}.{old.get(parameter, parameter)}"
                    self._places[name] = (path, stored)
                    self.shapes[name] = file.get_slice(stored).get_shape()

    def row(self, name: str, number: int) -> Floats:
        """One row of a weight."""
        path, stored = self._places[name]
        with self._open(path, "pt") as file:
            row: Floats = file.get_slice(stored)[number].float().numpy()
        return row

    def rows(self, name: str, first: int = 0) -> Iterator[Floats]:
        """A weight from one row on, in pieces."""
        path, stored = self._places[name]
        count, *rest = self.shapes[name]
        step = max(_PIECE // math.prod(rest), 1)
        for start in range(first, count, step):
            with self._open(path, "pt") as file:
                yield file.get_slice(stored)[start : start + step].float().numpy()


def _tensors(
    weights: _Weights, config: PretrainedConfig, layout: Layout, checkpoint: Checkpoint
) -> Iterator[_Tensor]:
    """The file's tensors: those that transformers reads, whatever else the checkpoint holds."""
    torch = need("torch")
    with torch.device("meta"):
        model = auto_class(config.to_dict()).from_config(config, trust_remote_code=False)
    unmapped = []
    for name, _ in model.named_parameters():
        module, _, parameter = name.rpartition(".")
        if module in layout.head:
            continue
        if name not in weights.shapes:
            raise ConversionError(f"{checkpoint.folder} has no weight {name}")
        number = re.search(r"\.(\d+)\.", module)
        theirs = layout.names.get(re.sub(r"\.\d+\.", ".{}.", module))
        if theirs is None or (layout.arch == "modern-bert" and _is_extra_bias(theirs, parameter)):
            unmapped.append(name)
            continue
        target = f"{theirs.format(number[1] if number else '')}.{parameter}"
        shape, load = list(weights.shapes[name]), partial(weights.rows, name)
        if theirs == "position_embd":
            first = layout.unread(config)
            shape[0] -= first
            load = partial(weights.rows, name, first)
        elif theirs == "token_embd" and (types := _types(checkpoint)) > 1:
            shape[0] *= types
            load = partial(_shifted, weights, name, types)
        elif layout.norms_minus_one and theirs.endswith("norm"):
            load = partial(_from_one, weights, name)
        elif layout.interleaved_rope and theirs.endswith(("attn_q", "attn_k")):
            queries = theirs.endswith("attn_q")
            heads = config.num_attention_heads if queries else config.num_key_value_heads
            load = partial(_paired, weights, name, heads)
        yield _Tensor(target, shape, load)
    if layout.head and (factors := rotary_factors(config)) is not None:
        yield _Tensor("rope_freqs.weight", list(factors.shape), lambda: iter([factors]))
    if _serves(checkpoint.family):
        rows = _label_rows(weights, config, checkpoint.family)
        yield _Tensor("cls.output.weight", list(rows.shape), lambda: iter([rows]))
    if unmapped:
        raise ConversionError(f"llama.cpp's {layout.arch} has no place for: {', '.join(unmapped)}")


def _is_extra_bias(theirs: str, parameter: str) -> bool:
    """llama.cpp's ModernBERT knows one bias, the classifier's."""
    return parameter == "bias" and theirs != "cls.output"


def _from_one(weights: _Weights, name: str) -> Iterator[Floats]:
    """A norm's weights as llama.cpp multiplies by them."""
    for rows in weights.rows(name):
        yield rows + 1


def _paired(weights: _Weights, name: str, heads: int) -> Iterator[Floats]:
    """Rows of each head with what is turned together side by side, not half a head apart."""
    rows = np.concatenate(list(weights.rows(name)))
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    yield halves.swapaxes(1, 2).reshape(rows.shape)


def _shifted(weights: _Weights, name: str, types: int) -> Iterator[Floats]:
    """The vocabulary once for every token type; llama.cpp adds type 0 itself."""
    (shifts,) = weights.rows(name.replace("word_embeddings", "token_type_embeddings"))
    for number in range(types):
        for words in weights.rows(name):
            yield words + (shifts[number] - shifts[0])


def _quantize(source: Path, target: Path, precision: str, kinds: dict[str, str]) -> None:
    """Let llama.cpp quantize a file.

    Args:
        source: in f16.
        target: to write.
        precision: what llama.cpp calls a file type.
        kinds: tensor -> its type, where that is not for llama.cpp to choose.
    """
    llama, types = library(), need("gguf").GGMLQuantizationType
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = _FTYPES[precision]
    settings.nthread = processors()
    settings.max_buf_size = _BUFFER
    chosen: list[tuple[bytes | None, int]]
    chosen = [(f"^{re.escape(name)}$".encode(), types[kind]) for name, kind in kinds.items()]
    chosen += [(b"^cls", types.F32), (None, 0)]
    settings.tt_overrides = (llama.llama_model_tensor_override * len(chosen))(*chosen)
    complaint()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings)):
        raise ConversionError(f"llama.cpp cannot quantize to {precision}: {complaint()}")
