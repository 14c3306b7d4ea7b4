"""Even out a model's channels before its weights are quantized; what it computes stays the same.

Numbers that are quantized together share a scale, so one large channel makes its neighbours coarse.
Where a vector is made linearly, by a norm or a product, and only products read it, channel j can be
divided by s_j where it is made and multiplied by s_j where it is read. As in SmoothQuant (arXiv
2211.10438, with alpha = 0.5), s_j = sqrt(max |x_j| / max |w_j|): the activations' range and the
weights' range then meet in the middle. Each s_j is a power of two, rounded towards 1, which changes
exponents and no digits: the result is exact in every data type. Usual channels stay as they are.

Such vectors are, by family:

| family | after a norm | values | feed-forward |
|---|---|---|---|
| Qwen2, Qwen3, Llama, Gemma | both norms of a layer | yes | yes: `up` is linear |
| ModernBERT | both, but for the first layer's attention | yes | yes: half of `Wi` is linear |
| gte, jina-reranker-v1 | no: the residual sum reads them too | yes | yes: half is linear |
| BERT and its relatives | no: the residual sum reads them too | yes | no: GELU is not linear |

A norm that is followed by a residual sum feeds the next norm, whose mean and variance would change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qrank.bundle.family import Family
from qrank.bundle.sequences import Floats, Sequences
from qrank.converters.checkpoint.configuration import read_config
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.checkpoint.reference import run_reference
from qrank.system.extras import need

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Rule = tuple[str, tuple[str, ...]]
"""Within a layer: the module whose output is a vector, or ends with it, and all that read it."""

_CAUSAL: tuple[Rule, ...] = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
_BERT: tuple[Rule, ...] = (("attention.self.value", ("attention.output.dense",)),)

_RULES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(("qwen2", "qwen3", "llama", "llama_bidirec", "gemma"), _CAUSAL),
    "modernbert": (
        ("attn_norm", ("attn.Wqkv",)),
        ("mlp_norm", ("mlp.Wi",)),
        ("attn.Wqkv", ("attn.Wo",)),
        ("mlp.Wi", ("mlp.Wo",)),
    ),
    "gte": (
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "jina_bert": (*_BERT, ("mlp.gated_layers", ("mlp.wo",))),
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta", "camembert"), _BERT),
    "deberta-v2": (("attention.self.value_proj", ("attention.output.dense",)),),
    "distilbert": (("attention.v_lin", ("attention.out_lin",)),),
    "mpnet": (("attention.attn.v", ("attention.attn.o",)),),
}
"""Rules by `model_type`: other classes give the same names to other computations (Gemma 2's
`post_attention_layernorm` comes after attention)."""

_MOST = 6
"""Largest exponent of a factor: no number may leave fp16's range."""

_PAIRS = 16
"""Pairs that are enough to know a channel's range: all would take as long as the reference."""

_LEAST = 1e-5
"""Channels of a smaller range carry nothing and stay as they are."""


@dataclass(frozen=True)
class Scaling:
    """How one weight or bias changes; every factor is a power of two.

    Attributes:
        rows: a factor per output, shape [outputs], or [1] for all.
        columns: a factor per input, shape [inputs]; None: unchanged, as in a bias.
        shift: what the model adds to the stored number before using it: 1 for Gemma's norms.
    """

    rows: Floats
    columns: Floats | None = None
    shift: float = 0.0

    def apply(self, values: Any, first: int = 0) -> Any:
        """The changed numbers.

        Args:
            values: rows of the weight from number `first` on; an array or a tensor, of shape
                [n, inputs] or [n].
            first: see `values`.
        """
        factors = self.rows if len(self.rows) == 1 else self.rows[first : first + len(values)]
        if values.ndim == 2:
            factors = factors[:, None] * (1 if self.columns is None else self.columns)
        if not isinstance(values, np.ndarray):
            factors = need("torch").from_numpy(factors).to(values.dtype)
        if self.shift:
            return (values + self.shift) * factors - self.shift
        return values * factors

    def after(self, first: Scaling | None) -> Scaling:
        """This change after another one, as one."""
        if first is None:
            return self
        columns = [c for c in (first.columns, self.columns) if c is not None]
        whole = np.prod(columns, axis=0) if columns else None
        return Scaling(first.rows * self.rows, whole, self.shift)


def scalings(checkpoint: Checkpoint, calibration: Sequences) -> Mapping[str, Scaling]:
    """How each parameter of a checkpoint changes, by its name; {} without rules for its class.

    Variants are made one after the other: the last answer is kept.

    Args:
        checkpoint: loaded here, if it has rules.
        calibration: pairs whose activations say how large each channel becomes.
    """
    key = (checkpoint.source, tuple(ids.tobytes() for ids in calibration.ids))
    if key not in _known:
        _known.clear()
        _known[key] = _measured(checkpoint, calibration)
    return _known[key]


_known: dict[object, Mapping[str, Scaling]] = {}


def even(model: PreTrainedModel, found: Mapping[str, Scaling]) -> None:
    """Even out a model in place, by `scalings` of its checkpoint."""
    for name, scaling in found.items():
        parameter = model.get_parameter(name)
        parameter.data = scaling.apply(parameter.data)


def balance(x: Floats, w: Floats) -> Floats:
    """s_j = sqrt(max |x_j| / max |w_j|), with a geometric mean of 1.

    Args:
        x: max |x_j| of a vector's channels.
        w: max |w_j| of the weights that channel j is multiplied by, of the same shape.
    """
    live = (x > _LEAST) & (w > _LEAST)
    s = np.sqrt(np.where(live, x, 1) / np.where(live, w, 1))
    middle = np.exp(np.log(s[live]).mean()) if live.any() else 1
    even: Floats = np.where(live, s / middle, 1).astype(np.float32)
    return even


def _measured(checkpoint: Checkpoint, calibration: Sequences) -> Mapping[str, Scaling]:
    if read_config(checkpoint.folder)["model_type"] not in _RULES:
        return {}
    model = checkpoint.load_to_run()
    vectors = list(_vectors(model))
    calibration = calibration.take(np.arange(0, len(calibration), -(-len(calibration) // _PAIRS)))
    names = {readers[0] for _, readers in vectors}
    largest = _maxima(model, names, calibration, checkpoint.family)
    found: dict[str, Scaling] = {}
    for maker, readers in vectors:
        made = model.get_submodule(maker)
        read = [model.get_parameter(f"{name}.weight").detach() for name in readers]
        outputs = len(model.get_parameter(f"{maker}.weight"))
        shape = _shape(outputs, read[0].shape[1], model.config)
        s = _factors(largest[readers[0]], read, shape)
        shift = 1.0 if type(made).__name__ == "GemmaRMSNorm" else 0.0
        changes = {
            f"{name}.weight": Scaling(np.ones(1, np.float32), s.reshape(-1)) for name in readers
        }
        for name, parameter in made.named_parameters(recurse=False):
            rows = np.ones(len(parameter), np.float32)
            rows[len(parameter) - s[:, 0].size :] = 1 / s[:, 0].reshape(-1)
            changes[f"{maker}.{name}"] = Scaling(rows, shift=shift)
        even(model, changes)
        found |= {name: scaling.after(found.get(name)) for name, scaling in changes.items()}
    return found


def _vectors(model: PreTrainedModel) -> Iterator[Rule]:
    """The rules that hold, with whole names of modules."""
    for layer, module in model.named_modules():
        # ModernBERT's first norm is none: a module without parameters.
        present = {name for name, part in module.named_modules() if list(part.parameters())}
        for maker, readers in _RULES.get(model.config.model_type, ()):
            if present.issuperset((maker, *readers)):
                yield f"{layer}.{maker}", tuple(f"{layer}.{reader}" for reader in readers)


def _maxima(
    model: PreTrainedModel, names: set[str], calibration: Sequences, family: Family
) -> dict[str, Floats]:
    """max |x_j| over all tokens, for the inputs of some modules."""
    largest: dict[str, Floats] = {}

    def seeing(name: str) -> Any:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().abs().reshape(-1, inputs[0].shape[-1]).amax(0).float().numpy()
            largest[name] = np.maximum(largest.get(name, x), x)

        return see

    handles = [model.get_submodule(n).register_forward_pre_hook(seeing(n)) for n in names]
    if handles:
        run_reference(model, calibration.whole(), family)
    for handle in handles:
        handle.remove()
    return largest


def _shape(outputs: int, inputs: int, config: PretrainedConfig) -> tuple[int, int, int]:
    """The shape of a vector that is read: heads, repetitions of each head, channels of a head.

    Several query heads may share a head of values, which is then read once per query head.

    Args:
        outputs: of the module that makes the vector.
        inputs: of those that read it.
        config: the model's.
    """
    if outputs >= inputs:
        return 1, 1, inputs
    heads: int = config.num_key_value_heads
    return heads, inputs // outputs, outputs // heads


def _factors(x: Floats, read: list[torch.Tensor], shape: tuple[int, int, int]) -> Floats:
    """s for every channel that is read, in `shape`: powers of two, the same for all repetitions."""
    w = np.max([weight.abs().amax(0).float().numpy() for weight in read], axis=0)
    s = balance(*(values.reshape(shape).max(1, keepdims=True) for values in (x, w)))
    exponents = np.trunc(np.log2(s)).clip(-_MOST, _MOST)
    return np.broadcast_to(np.exp2(exponents), shape)
