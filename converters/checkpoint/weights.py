"""A checkpoint's weights: the files that transformers reads and the model it makes from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.converters.checkpoint.configuration import (
    auto_class,
    explained,
    read_config,
    read_json,
    transformers_for,
)
from qrank.errors import ConversionError, FamilyError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"

_ADAPTERS = ("adapter_config.json", "adapter_model.*", "pytorch_adapter.*")
"""Files of an adapter, with or without its base model, from the packages peft and adapters."""

_ADAPTED = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")
"""Parts of the names that peft gives to weights."""


def refuse_adapter(folder: Path, source: str) -> None:
    """Refuse a checkpoint with an adapter.

    transformers adds an adapter automatically if peft is installed, and otherwise ignores it
    silently.

    Raises:
        FamilyError: there is an adapter in the folder.
    """
    found = sorted({path.name for pattern in _ADAPTERS for path in folder.glob(pattern)})
    if not found:
        return
    base = ""
    if (folder / _ADAPTERS[0]).is_file():
        named = read_json(folder / _ADAPTERS[0], dict, source).get("base_model_name_or_path")
        base = f" of {named}" if named and isinstance(named, str) else ""
    raise FamilyError(
        f"{source} holds an adapter{base} ({', '.join(found)}), which changes the scores of its "
        "base model: merge the two with peft (load both, then merge_and_unload()), save_pretrained "
        "the model and its tokenizer to a new folder, and convert that"
    )


def weight_files(folder: Path, source: str) -> list[Path]:
    """The safetensors files that transformers reads.

    Raises:
        FamilyError: there are none.
        ConversionError: the index file is damaged, or a file that it names is missing.
    """
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, dict, source)
        for key in ("metadata", "weight_map"):
            if not isinstance(index.get(key), dict):
                raise ConversionError(
                    f"{source}: {INDEX} has {key} = {index.get(key)!r}; expected an object"
                )
        places = index["weight_map"]
        names = sorted({str(name) for name in places.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ConversionError(f"{source}: {INDEX} names {name}, which is not in the folder")
        return [folder / name for name in names]
    kinds = (".safetensors", ".bin", ".pt", ".pth")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in kinds)
    raise FamilyError(
        f"{source} has no model.safetensors (found: {', '.join(others) or 'no weights'}); qrank "
        "reads what transformers does, and no pickles: save the model again with save_pretrained"
    )


def load_model(folder: Path, *, dtype: str, attention: str) -> PreTrainedModel:
    """transformers' own model of a checkpoint.

    Args:
        folder: the checkpoint's folder.
        dtype: torch's name of the data type.
        attention: transformers' name of the attention implementation.

    Raises:
        ConversionError: the weights do not fit the architecture.
    """
    config = read_config(folder)
    transformers_for(config).utils.logging.disable_progress_bar()
    with explained(f"transformers cannot load {folder}"):
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    unread = sorted(info["unexpected_keys"])
    if adapted := [name for name in unread if any(part in name for part in _ADAPTED)]:
        raise ConversionError(
            f"{folder} holds weights of an adapter that is not merged: {adapted[0]} and "
            f"{len(adapted) - 1} more; merge it with peft (merge_and_unload()) and save it again"
        )
    if unfit := sorted(info["mismatched_keys"]):
        name, stored, wanted = unfit[0]
        raise ConversionError(
            f"{folder}: the weights are of another size than config.json says: {name} has the "
            f"shape {list(stored)}, and {list(wanted)} is expected"
        )
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(
            f"{folder} lacks weights of {type(model).__name__}: {', '.join(missing)}; "
            "is it a reranker?"
        )
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def upcast_lazily(model: PreTrainedModel) -> PreTrainedModel:
    """A model that computes in fp32, upcasting each linear layer's weights as it runs.

    The weights keep their stored data type and take half the memory; results are identical.
    """
    torch = need("torch")

    class LazyLinear(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.linear(x, self.weight.float(), bias)

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = LazyLinear
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    module.register_buffer(name, buffer.float(), persistent=False)
    return model
