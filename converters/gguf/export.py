"""A checkpoint -> a GGUF file that llama.cpp scores as transformers does.

The file is written tensor by tensor from the checkpoint's safetensors and quantized by llama.cpp
itself. llama.cpp's own converter drops BERT's pooler, and its graph gives all tokens type 0. Here
the pooler is the head's first layer, and a model with two token types gets its vocabulary twice:
rows of the second copy are shifted by (type 1 - type 0), and the backend takes ids of type 1 from
it. (Shifted positions would be smaller, but llama.cpp accepts only consecutive ones.)
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrank.backends.gguf import FILE, TYPE_STRIDE
from qrank.backends.gguf_decoder import HEAD
from qrank.backends.llama import complaint, library
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint import evening
from qrank.converters.checkpoint.configuration import make_settings, read_config
from qrank.converters.checkpoint.evened_weights import Weights, score_head
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.gguf.layouts import Layout, describe
from qrank.converters.gguf.tensors import Tensor, has_flags, llama_scores, tensors_of, token_types
from qrank.converters.gguf.vocabulary import rerank_template, same_ids, write_vocabulary
from qrank.errors import ConversionError
from qrank.system.extras import need
from qrank.system.machine import processors

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

MODULES = ("torch", "transformers", "safetensors", "gguf", "llama_cpp")
"""Modules needed to convert and verify."""

MEMORY = 0.5
"""The minimum memory for converting, as a multiple of the size in fp32 (docs/benchmarks.md)."""

_FTYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
"""llama.cpp's enum llama_ftype."""

_BLOCKS = {"q8_0": 32, "q4_k_m": 256}
"""Elements per quantization block: a row's length must be a multiple of it."""

_STAND_IN, _STAND_IN_BLOCK = "Q5_1", 32
"""For rows that K-quants do not fit: closer to the original than llama.cpp's choice, Q5_0."""

_WORDS, _WORDS_STAND_IN = "token_embd.weight", "Q8_0"
"""The vocabulary then stays at 8 bits, as in llama.cpp: it also holds the token types, and a lookup
costs no time. The Kendall tau of `mini` to its original is 0.96; at Q5_1 it is 0.73."""

_BUFFER = 2**27
"""Bytes of weights that the quantizer holds in memory at once."""


def disk(number: float) -> float:
    """Disk bytes per weight during conversion, given `number` bytes afterwards.

    A file in f16 is written first.
    """
    return max(2.0, number)


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences) -> str:
    """Write `model.gguf` into a folder, and a decoder's head as `head.npy`.

    Args:
        checkpoint: read from its folder, one tensor at a time.
        precision: one of the format's `made` precisions. The score head is always f32.
        folder: exists and is empty.
        calibration: pairs whose activations the channels are evened out by, but for f16.

    Returns:
        A note on the fallback types that replace the precision in some matrices; or "".

    Raises:
        ConversionError: llama.cpp cannot represent the model, or its quantizer fails.
    """
    path = folder / FILE
    scalings = {} if precision == "f16" else evening.scalings(checkpoint, calibration)
    weights = Weights(checkpoint.folder, scalings)
    matrices = _write(checkpoint, weights, path)
    if precision == "f16":
        return ""
    block = _BLOCKS[precision]
    kinds = _fallback_types(matrices, block)
    flags = _flags(matrices, precision) if has_flags(weights, checkpoint) else {}
    plain = path.rename(folder / "f16.gguf")
    _quantize(plain, path, precision, kinds | flags)
    plain.unlink()
    notes = []
    if kinds:
        unfit = sorted({t.shape[-1] for t in matrices if t.shape[-1] % block})
        notes.append(
            f"rows of {', '.join(map(str, unfit))} do not fit {block}: "
            f"{len(kinds)} of {len(matrices)} matrices are {', '.join(sorted(set(kinds.values())))}"
        )
    if flags:
        notes.append(f"token types are flags: {len(flags)} of {len(matrices)} matrices stay F16")
    return "; ".join(notes)


def _flags(matrices: Sequence[Tensor], precision: str) -> dict[str, str]:
    """The type of matrices that a model with flags (see `has_flags`) needs exactly.

    A flag should be the same for all tokens of a text, and attention multiplies it by large
    numbers. Rounded activations, in blocks of 32, and rounded words make it differ from token to
    token. In q4_k_m the words' rounding does not matter beside that of other weights.
    """
    exact = ("attn_q.weight", "attn_k.weight", *([_WORDS] if precision == "q8_0" else []))
    return {t.name: "F16" for t in matrices if t.name.endswith(exact)}


def _fallback_types(matrices: Sequence[Tensor], block: int) -> dict[str, str]:
    """The fallback types of matrices that cannot or should not have the precision's type.

    If the vocabulary's rows do not fit the block, hardly any do, and the few that do are 4 % of the
    file. They get a fallback type too: left at Q4_K, `mini` has a Kendall tau of 0.64, not 0.96.
    """
    unfit = [t for t in matrices if t.shape[-1] % block]
    if block > _STAND_IN_BLOCK and any(t.name == _WORDS for t in unfit):
        unfit = list(matrices)
    fitting = {_WORDS: _WORDS_STAND_IN}
    return {
        t.name: "F16" if t.shape[-1] % _STAND_IN_BLOCK else fitting.get(t.name, _STAND_IN)
        for t in unfit
    }


def _write(checkpoint: Checkpoint, weights: Weights, path: Path) -> list[Tensor]:
    """Write the whole file in f16 and return the tensors in f16: the rest are f32."""
    gguf = need("gguf")
    layout = Layout.of(checkpoint.family.architecture)
    config = make_settings(read_config(checkpoint.folder))
    layout.check(config, checkpoint.window)
    writer = gguf.GGUFWriter(path, layout.arch)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    writer.add_file_type(_FTYPES["f16"])
    describe(writer, config, layout, checkpoint.family)
    _describe_vocabulary(writer, config, layout, checkpoint)
    tensors = list(tensors_of(weights, config, layout, checkpoint))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()
    if layout.head:
        np.save(path.with_name(HEAD), score_head(weights, config, checkpoint.family))
    return [tensor for tensor in tensors if tensor.dtype == np.float16]


def _describe_vocabulary(
    writer: gguf.GGUFWriter, config: PretrainedConfig, layout: Layout, checkpoint: Checkpoint
) -> None:
    """Write the tokenizer if llama.cpp alone scores correctly, otherwise the reason why not."""
    family, pairs = checkpoint.family, probe_pairs(checkpoint.words)
    made = f"Made by qrank from {checkpoint.source.id}. "
    if layout.head and not llama_scores(family):
        without = "llama.cpp knows no such score head, which lies beside it"
    elif token_types(checkpoint) > 1:
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
    writer.add_vocab_size(config.vocab_size * token_types(checkpoint))
    writer.add_uint32(TYPE_STRIDE, config.vocab_size)


def _quantize(source: Path, target: Path, precision: str, kinds: dict[str, str]) -> None:
    """Let llama.cpp quantize a file.

    Args:
        source: the file in f16.
        target: the file to write.
        precision: a file type of llama.cpp.
        kinds: tensor -> its type, for tensors whose type llama.cpp must not choose.
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
