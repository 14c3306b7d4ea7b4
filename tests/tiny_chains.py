"""Checkpoints that are chains of sentence-transformers' modules, and their own computation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from qrank.bundle.sequences import Logits

ETTIN = ["Transformer", "Pooling", "Dense", "LayerNorm", "Dense"]
PLAIN = ["Transformer", "Pooling", "Dense", "Dense"]
ACTIVATIONS = "torch.nn.modules.activation."


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def module(kind: str, number: int) -> dict[str, Any]:
    home = "base" if kind in ("Transformer", "Dense") else "sentence_transformer"
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
    return {
        "idx": number,
        "name": str(number),
        "path": f"{number}_{kind}" if number else "",
        "type": f"sentence_transformers.{home}.modules.{name}.{kind}",
    }


class Chain:
    """A checkpoint of modules, and its own computation in plain torch.

    Attributes:
        folder: the checkpoint.
        kinds: its modules.
    """

    def __init__(self, folder: Path, kinds: list[str]) -> None:
        self.folder = folder
        self.kinds = kinds
        self.layers: list[torch.nn.Module] = []
        self.mean = False

    def logits(self, pairs: list[tuple[str, str]]) -> Logits:
        """As sentence-transformers computes them, one pair at a time."""
        model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        found = []
        with torch.inference_mode():
            for query, document in pairs:
                # As a batch of one: otherwise an empty document would count as no document.
                inputs = tokenizer(
                    [query], [document], truncation="only_second", return_tensors="pt"
                )
                states = model(**inputs).last_hidden_state
                x = states.mean(1) if self.mean else states[:, 0]
                for layer in self.layers:
                    x = layer(x)
                found.append(x.item())
        return np.array(found, np.float32)


def chain(
    base: Path,
    folder: Path,
    kinds: list[str],
    *,
    activation: str = "GELU",
    bias: bool = False,
    pooling: dict[str, Any] | None = None,
) -> Chain:
    """A chain of modules behind the model of a tiny checkpoint, whose head is dropped."""
    shutil.copytree(base, folder)
    made = Chain(folder, kinds)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = config["architectures"][0].replace("ForSequenceClassification", "Model")
    for key in ("id2label", "label2id", "num_labels", "classifier_pooling", "classifier_bias"):
        config.pop(key, None)
    write(folder / "config.json", config | {"architectures": [name]})
    stored = load_file(folder / "model.safetensors")
    prefix = {"ModernBertModel": "model.", "BertModel": "bert."}.get(name, "roberta.")
    trunk = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    save_file(trunk, folder / "model.safetensors", {"format": "pt"})
    write(folder / "modules.json", [module(kind, i) for i, kind in enumerate(kinds)])
    write(
        folder / "config_sentence_transformers.json",
        {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"},
    )
    write(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    pooling = pooling or {"embedding_dimension": config["hidden_size"], "pooling_mode": "cls"}
    made.mean = pooling.get("pooling_mode_mean_tokens", False)
    size = config["hidden_size"]
    torch.manual_seed(5)
    for number, kind in enumerate(kinds):
        place = folder / f"{number}_{kind}"
        if kind == "Pooling":
            write(place / "config.json", pooling)
        elif kind == "LayerNorm":
            norm = torch.nn.LayerNorm(size)
            torch.nn.init.normal_(norm.weight, 1, 0.3)
            torch.nn.init.normal_(norm.bias)
            made.layers.append(norm)
            write(place / "config.json", {"dimension": size})
            save_file(
                {f"norm.{k}": v for k, v in norm.state_dict().items()}, place / "model.safetensors"
            )
        elif kind == "Dense":
            last = number == len(kinds) - 1
            linear = torch.nn.Linear(size, 1 if last else size, bias=bias or last)
            torch.nn.init.normal_(linear.weight, std=0.3)
            made.layers.append(linear)
            if not last:
                made.layers.append(getattr(torch.nn, activation)())
            write(
                place / "config.json",
                {
                    "in_features": size,
                    "out_features": linear.out_features,
                    "bias": linear.bias is not None,
                    "activation_function": "torch.nn.modules.linear.Identity"
                    if last
                    else ACTIVATIONS + activation,
                    "module_input_name": "sentence_embedding",
                    "module_output_name": "scores" if last else "sentence_embedding",
                },
            )
            weights = {f"linear.{k}": v for k, v in linear.state_dict().items()}
            save_file(weights, place / "model.safetensors")
    return made
