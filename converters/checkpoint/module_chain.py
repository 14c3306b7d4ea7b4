"""sentence-transformers' chains of modules, read as a classifier of transformers.

A CrossEncoder may consist of a model without a head (Transformer), Pooling, Dense and LayerNorm
modules, each in a folder with its own config.json and weights; Ettin's rerankers do. Two layers of
the right kind are the head of a class of transformers. Source: base/modules/dense.py,
sentence_transformer/modules/{pooling,layer_norm}.py and cross_encoder/model.py of
sentence-transformers 6.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qrank.converters.checkpoint.json_files import read_json
from qrank.converters.checkpoint.rewriting import ONE_LABEL, Rewriting, WeightMap
from qrank.converters.checkpoint.stored import Values, parts_of, safetensors_files
from qrank.errors import ConversionError, FamilyError

MODULES = "modules.json"

FILES = ("*_Pooling/config.json", "*_Dense/config.json", "*_LayerNorm/config.json")
"""The files that describe modules."""

WEIGHTS = ("*_Dense/model.safetensors", "*_LayerNorm/model.safetensors")
"""The files that hold their weights."""

_KNOWN = ("Transformer", "Pooling", "Dense", "LayerNorm")

_ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
"""A Dense module's activation -> transformers' name of it."""

_NORM_EPS = 1e-5
"""Epsilon of the LayerNorm module, which has no option for it."""

_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""One flag per pooling, as written before sentence-transformers 5.4."""


@dataclass(frozen=True)
class _Trunk:
    """A class without a head, and where a classifier of transformers has it.

    Attributes:
        architecture: the classifier.
        prefix: of its names for the model without the head.
        dense: its name of the head's first layer.
        out: its name of the head's last layer.
        activation: the activation between the two; None: config.json says.
        norm: its name of the layer norm between the two; None: there is none.
        poolings: the poolings that it can do.
    """

    architecture: str
    prefix: str
    dense: str
    out: str
    activation: str | None = "tanh"
    norm: str | None = None
    poolings: tuple[str, ...] = ("cls",)


def _roberta(name: str) -> _Trunk:
    return _Trunk(
        f"{name}ForSequenceClassification", "roberta.", "classifier.dense", "classifier.out_proj"
    )


_TRUNKS = {
    "BertModel": _Trunk(
        "BertForSequenceClassification", "bert.", "bert.pooler.dense", "classifier"
    ),
    "CamembertModel": _roberta("Camembert"),
    "ModernBertModel": _Trunk(
        "ModernBertForSequenceClassification",
        "model.",
        "head.dense",
        "classifier",
        activation=None,
        norm="head.norm",
        poolings=("cls", "mean"),
    ),
    "RobertaModel": _roberta("Roberta"),
    "XLMRobertaModel": _roberta("XLMRoberta"),
}


class _Chain:
    """The modules of a checkpoint, and their configurations."""

    def __init__(self, folder: Path, source: str, modules: list[Any]) -> None:
        self.folder = folder
        self.source = source
        self.kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        self.places = [str(module["path"]) for module in modules]
        for kind, place in zip(self.kinds[1:], self.places[1:], strict=True):
            if kind not in _KNOWN or not place or Path(place).name != place:
                raise self.refusal(f"lists {kind} in {place!r}")
        self.configs = [self._config(place) for place in self.places[1:]]

    def _config(self, place: str) -> dict[str, Any]:
        name = f"{place}/config.json"
        try:
            config: dict[str, Any] = read_json(self.folder / name, dict, self.source, name)
        except FileNotFoundError:
            raise ConversionError(
                f"{self.source}: {MODULES} lists {place}, and {name} is missing"
            ) from None
        return config

    def refusal(self, why: str) -> FamilyError:
        return FamilyError(
            f"{self.source}: {MODULES} {why}. Of chains of modules, qrank reads Transformer, "
            "Pooling, Dense (with ModernBERT LayerNorm), and Dense with one output"
        )

    def pooling(self) -> str:
        """How token embeddings become one: `cls`, `mean`, ...; several are joined by "+"."""
        config = self.configs[0]
        if config.get("include_prompt") is False:
            raise self.refusal(f"has {self.places[1]} with include_prompt = false")
        modes = config.get("pooling_mode")
        if modes is None:
            modes = [mode for key, mode in _OLD_POOLINGS.items() if config.get(key)] or ["mean"]
        return modes if isinstance(modes, str) else "+".join(map(str, modes))

    def activation(self, number: int) -> str:
        """The activation of a Dense module, by transformers' name."""
        config, place = self.configs[number - 1], self.places[number]
        named = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        if config.get("use_residual"):
            raise self.refusal(f"has {place} with use_residual = true")
        if named not in _ACTIVATIONS:
            raise self.refusal(
                f"has {place} with activation_function = {named!r}; known are: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[named]


def is_chain(kinds: list[str]) -> bool:
    """Whether modules of these kinds are a chain as read here."""
    return kinds[:2] == ["Transformer", "Pooling"] and kinds[-1] == "Dense"


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """The classifier that a chain of modules is; None if the checkpoint is not such a chain.

    Raises:
        FamilyError: it is a chain that no classifier of transformers computes.
        ConversionError: a file of it is damaged or missing.
    """
    try:
        modules = read_json(folder / MODULES, list, source)
    except FileNotFoundError:
        return None
    if not all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules):
        return None  # refused where the other metadata is read
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if not is_chain(kinds):
        return None
    chain = _Chain(folder, source, modules)
    if chain.configs[-1].get("out_features") != 1:
        return None  # an embedding model
    named = (config.get("architectures") or [""])[0]
    if (trunk := _TRUNKS.get(named)) is None:
        raise chain.refusal(f"has a Transformer of class {named or '(none)'}")
    wanted = ["Transformer", "Pooling", "Dense", *(["LayerNorm"] if trunk.norm else []), "Dense"]
    if kinds != wanted:
        raise chain.refusal(f"lists {', '.join(kinds)} for {named}; expected {', '.join(wanted)}")
    if (pooling := chain.pooling()) not in trunk.poolings:
        raise chain.refusal(f"has pooling {pooling} for {named}")
    made = {
        **config,
        "architectures": [trunk.architecture],
        **ONE_LABEL,
        **_head(chain, config, trunk, pooling),
    }
    made.pop("num_labels", None)
    return Rewriting(
        "a chain of modules (" + ", ".join(kinds) + ")",
        made,
        partial(_files, chain),
        partial(_weights, chain, trunk, bool(made.get("norm_bias"))),
    )


def _head(chain: _Chain, config: Mapping[str, Any], trunk: _Trunk, pooling: str) -> dict[str, Any]:
    """The keys of config.json that describe the head.

    Raises:
        FamilyError: the classifier has no such head.
    """
    first, last = chain.activation(2), chain.activation(len(chain.kinds) - 1)
    if last != "identity":
        raise chain.refusal(f"has {chain.places[-1]} with the activation {last}")
    if trunk.activation is not None:
        if first != trunk.activation or not chain.configs[1].get("bias", True):
            raise chain.refusal(
                f"has {chain.places[2]} with the activation {first} and bias = "
                f"{chain.configs[1].get('bias', True)}; expected {trunk.activation}, and a bias"
            )
        return {}
    if config.get("norm_eps", _NORM_EPS) != _NORM_EPS:
        raise chain.refusal(
            f"has a LayerNorm, whose epsilon is {_NORM_EPS}, and config.json has norm_eps = "
            f"{config['norm_eps']}"
        )
    return {
        "classifier_activation": first,
        "classifier_bias": bool(chain.configs[1].get("bias", True)),
        "classifier_pooling": pooling,
    }


def _files(chain: _Chain) -> list[Path]:
    found = safetensors_files(chain.folder, chain.source)
    for place, kind in zip(chain.places, chain.kinds, strict=True):
        if kind in ("Dense", "LayerNorm"):
            found += safetensors_files(chain.folder / place, f"{chain.source}, {place}")
    return found


def _weights(chain: _Chain, trunk: _Trunk, norm_bias: bool, files: list[Path]) -> WeightMap:
    """The classifier's weights; a norm's bias that it lacks is added to the last layer's bias."""
    stored = parts_of(path for path in files if path.parent == chain.folder)
    bare = {name.removeprefix(trunk.prefix): part for name, part in stored.items()}
    found: dict[str, Any] = {
        f"{trunk.prefix}{name}": part
        for name, part in bare.items()
        if not name.startswith("pooler.")
    }
    dense, *norms, out = (parts_of([path]) for path in files if path.parent != chain.folder)
    found |= {f"{trunk.dense}.{name.removeprefix('linear.')}": part for name, part in dense.items()}
    found |= {f"{trunk.out}.{name.removeprefix('linear.')}": part for name, part in out.items()}
    for norm in norms:
        found[f"{trunk.norm}.weight"] = norm["norm.weight"]
        if norm_bias:
            found[f"{trunk.norm}.bias"] = norm["norm.bias"]
            continue
        # out(x * weight + bias) = out(x * weight) + out(bias)
        row, bias = (_values(part) for part in (out["linear.weight"], norm["norm.bias"]))
        own = _values(out["linear.bias"]) if "linear.bias" in out else 0.0
        found[f"{trunk.out}.bias"] = Values((own + row @ bias).astype(np.float32))
    found.setdefault(f"{trunk.out}.bias", Values(np.zeros(1, np.float32)))
    return found


def _values(part: Any) -> Any:
    """A small tensor in double precision."""
    return part.tensor().double().numpy()
