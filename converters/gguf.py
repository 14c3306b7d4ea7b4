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

from qrank.backends import processors
from qrank.backends.gguf import FILE, TYPE_STRIDE, complaint, library
from qrank.converters.checkpoint import Checkpoint
from qrank.converters.gguf_vocabulary import same_ids, write_vocabulary
from qrank.converters.probes import probe_pairs
from qrank.errors import ConversionError
from qrank.extras import need
from qrank.work import Work

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

PRECISIONS = ("q4_k_m", "q8_0", "f16")
MODULES = ("torch", "transformers", "safetensors", "gguf", "llama_cpp")
"""What converting and verifying takes."""

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

_BERT_LAYERS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "encoder.layer.{}.attention.self.query": "blk.{}.attn_q",
    "encoder.layer.{}.attention.self.key": "blk.{}.attn_k",
    "encoder.layer.{}.attention.self.value": "blk.{}.attn_v",
    "encoder.layer.{}.attention.output.dense": "blk.{}.attn_output",
    "encoder.layer.{}.attention.output.LayerNorm": "blk.{}.attn_output_norm",
    "encoder.layer.{}.intermediate.dense": "blk.{}.ffn_up",
    "encoder.layer.{}.output.dense": "blk.{}.ffn_down",
    "encoder.layer.{}.output.LayerNorm": "blk.{}.layer_output_norm",
}


@dataclass(frozen=True)
class _Layout:
    """How llama.cpp names what one transformers class holds.

    Attributes:
        arch: llama.cpp's name of the architecture.
        names: module in the checkpoint -> tensor in the file; `{}` is the layer's number.
        act: the config's key of the activation, which must be `gelu`: llama.cpp's only one.
        eps: the config's key of the layer norms' epsilon.
        after_pad: whether the position table begins with pad_token_id + 1 rows nobody reads.
    """

    arch: str
    names: dict[str, str]
    act: str = "hidden_act"
    eps: str = "layer_norm_eps"
    after_pad: bool = False


_LAYOUTS = {
    "BertForSequenceClassification": _Layout(
        "bert",
        {f"bert.{ours}": theirs for ours, theirs in _BERT_LAYERS.items()}
        | {"bert.pooler.dense": "cls", "classifier": "cls.output"},
    ),
    "XLMRobertaForSequenceClassification": _Layout(
        "bert",
        {f"roberta.{ours}": theirs for ours, theirs in _BERT_LAYERS.items()}
        | {"classifier.dense": "cls", "classifier.out_proj": "cls.output"},
        after_pad=True,
    ),
    "ModernBertForSequenceClassification": _Layout(
        "modern-bert",
        {
            "model.embeddings.tok_embeddings": "token_embd",
            "model.embeddings.norm": "token_embd_norm",
            "model.layers.{}.attn_norm": "blk.{}.attn_norm",
            "model.layers.{}.attn.Wqkv": "blk.{}.attn_qkv",
            "model.layers.{}.attn.Wo": "blk.{}.attn_output",
            "model.layers.{}.mlp_norm": "blk.{}.ffn_norm",
            "model.layers.{}.mlp.Wi": "blk.{}.ffn_up",
            "model.layers.{}.mlp.Wo": "blk.{}.ffn_down",
            "model.final_norm": "output_norm",
            "head.dense": "cls",
            "head.norm": "cls.norm",
            "classifier": "cls.output",
        },
        act="hidden_activation",
        eps="norm_eps",
    ),
}
"""By the name of transformers' class."""


def convert(checkpoint: Checkpoint, precision: str, folder: Path, calibration: Work) -> str:
    """Write `model.gguf` into a folder.

    Args:
        checkpoint: read from its folder, a tensor at a time.
        precision: one of PRECISIONS. The score head stays f32 in each.
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
    kinds = _stand_ins(matrices, block)
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


def _stand_ins(matrices: Sequence[_Tensor], block: int) -> dict[str, str]:
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
    gguf, transformers = need("gguf"), need("transformers")
    layout = _LAYOUTS.get(checkpoint.family.architecture)
    if layout is None:
        raise ConversionError(
            f"no GGUF layout of {checkpoint.family.architecture} is known; "
            f"known are: {', '.join(_LAYOUTS)}"
        )
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    for key in (layout.act, "classifier_activation"):
        if (found := getattr(config, key, "gelu")) != "gelu":
            raise ConversionError(f"{key} is {found!r}; llama.cpp knows gelu alone here")
    writer = gguf.GGUFWriter(path, layout.arch)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    writer.add_file_type(_FTYPES["f16"])
    _describe(writer, config, layout, checkpoint)
    tensors = list(_tensors(_Weights(checkpoint.folder), config, layout, checkpoint))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()
    return [tensor for tensor in tensors if tensor.dtype == np.float16]


def _describe(
    writer: gguf.GGUFWriter, config: PretrainedConfig, layout: _Layout, checkpoint: Checkpoint
) -> None:
    """Everything that is no tensor."""
    gguf, arch = need("gguf"), layout.arch
    writer.add_context_length(config.max_position_embeddings - _unread(config, layout))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(getattr(config, layout.eps))
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    if arch == "bert":
        writer.add_token_type_count(config.type_vocab_size)
    else:
        pooling = gguf.PoolingType[checkpoint.family.pooling.upper()]
        ropes = config.rope_parameters
        writer.add_uint32(f"{arch}.classifier.pooling_type", pooling.value)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.local_attention)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
    made = f"Made by qrank from {checkpoint.source.id}. "
    if (types := _types(checkpoint)) > 1:
        without = "llama.cpp gives every token type 0, and this model reads more"
    elif not same_ids(checkpoint, config.vocab_size, [t for pair in probe_pairs() for t in pair]):
        without = "llama.cpp would cut text into other tokens"
    else:
        write_vocabulary(writer, checkpoint, config.vocab_size)
        writer.add_description(f"{made}llama-server --rerank gives the same scores, as logits")
        return
    # Without a vocabulary, other programs refuse the file instead of scoring wrongly.
    writer.add_description(f"{made}For qrank alone: {without}")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size * types)
    writer.add_uint32(TYPE_STRIDE, config.vocab_size)


def _types(checkpoint: Checkpoint) -> int:
    """Token types that the template uses."""
    return max(checkpoint.family.segments or [0]) + 1


def _unread(config: PretrainedConfig, layout: _Layout) -> int:
    """Rows of the position table before the first token's."""
    return config.pad_token_id + 1 if layout.after_pad else 0


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
        for path in sorted(folder.glob("model*.safetensors")):
            with self._open(path, "pt") as file:
                for stored in file.keys():  # noqa: SIM118 (no mapping)
                    module, _, parameter = stored.rpartition(".")
                    name = f"{module}.{old.get(parameter, parameter)}"
                    self._places[name] = (path, stored)
                    self.shapes[name] = file.get_slice(stored).get_shape()

    def rows(self, name: str, first: int = 0) -> Iterator[Floats]:
        """A weight from one row on, in pieces."""
        path, stored = self._places[name]
        count, *rest = self.shapes[name]
        step = max(_PIECE // math.prod(rest), 1)
        for start in range(first, count, step):
            with self._open(path, "pt") as file:
                yield file.get_slice(stored)[start : start + step].float().numpy()


def _tensors(
    weights: _Weights, config: PretrainedConfig, layout: _Layout, checkpoint: Checkpoint
) -> Iterator[_Tensor]:
    """The file's tensors: those that transformers reads, whatever else the checkpoint holds."""
    torch, transformers = need("torch"), need("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    homeless = []
    for name, _ in model.named_parameters():
        if name not in weights.shapes:
            raise ConversionError(f"{checkpoint.folder} has no weight {name}")
        module, _, parameter = name.rpartition(".")
        number = re.search(r"\.(\d+)\.", module)
        theirs = layout.names.get(re.sub(r"\.\d+\.", ".{}.", module))
        if theirs is None or (layout.arch == "modern-bert" and _is_extra_bias(theirs, parameter)):
            homeless.append(name)
        elif theirs == "position_embd":
            first = _unread(config, layout)
            rows, width = weights.shapes[name]
            yield _Tensor(
                f"{theirs}.weight", [rows - first, width], partial(weights.rows, name, first)
            )
        elif theirs == "token_embd" and (types := _types(checkpoint)) > 1:
            rows, width = weights.shapes[name]
            load = partial(_shifted, weights, name, types)
            yield _Tensor(f"{theirs}.weight", [rows * types, width], load)
        else:
            target = f"{theirs.format(number[1] if number else '')}.{parameter}"
            yield _Tensor(target, weights.shapes[name], partial(weights.rows, name))
    if homeless:
        raise ConversionError(f"llama.cpp's {layout.arch} has no place for: {', '.join(homeless)}")


def _is_extra_bias(theirs: str, parameter: str) -> bool:
    """llama.cpp's ModernBERT knows one bias, the classifier's."""
    return parameter == "bias" and theirs != "cls.output"


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
