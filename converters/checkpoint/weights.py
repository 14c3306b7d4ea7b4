"""A checkpoint's weights: the files that transformers reads and the model it makes from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.converters.checkpoint.configuration import (
    auto_class,
    make_settings,
    read_rewriting,
    transformers_for,
)
from qrank.converters.checkpoint.json_files import explained, read_json
from qrank.converters.checkpoint.logs import errors_only
from qrank.converters.checkpoint.rewriting import WeightMap
from qrank.errors import ConversionError, FamilyError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """The safetensors files that hold a checkpoint's weights.

    Raises:
        FamilyError: there are none.
        ConversionError: the index file is damaged, or a file that it names is missing.
    """
    return read_rewriting(folder, source).files()


def read_weights(folder: Path) -> WeightMap:
    """The weights of the class that a checkpoint is read as; nothing large is loaded yet.

    Raises as `weight_files`.
    """
    rewriting = read_rewriting(folder)
    return rewriting.weights(rewriting.files())


def load_model(folder: Path, *, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """transformers' own model of a checkpoint.

    Args:
        folder: the checkpoint's folder.
        dtype: torch's name of the data type; "auto" for that of the file, or fp32 if the checkpoint
            is read as another class whose weights are computed.
        attention: transformers' name of the attention implementation. None: the fastest that the
            class has.

    Raises:
        ConversionError: the weights do not fit the architecture.
    """
    rewriting = read_rewriting(folder)
    config = rewriting.config
    transformers_for(config).utils.logging.disable_progress_bar()
    # What it warns about is checked below, or is about packages that would make it faster.
    with explained(f"transformers cannot load {folder}"), errors_only("transformers"):
        kind, given = auto_class(config), {}
        if rewriting.what:
            settings = make_settings(config)
            kind = kind._model_mapping[type(settings)]  # the class itself takes no files
            weights = rewriting.weights(rewriting.files())
            if dtype == "auto" and any(weight.computed for weight in weights.values()):
                dtype = "float32"
            tensors = {name: weight.tensor() for name, weight in weights.items()}
            given = {"config": settings, "state_dict": tensors}
        model, info = kind.from_pretrained(
            None if given else folder,
            **given,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    unread = sorted(info["unexpected_keys"])
    if unread and rewriting.what:
        raise ConversionError(
            f"{folder} holds weights that {type(model).__name__} has no place for: "
            f"{', '.join(unread[:3])}{', ...' if len(unread) > 3 else ''}. So it is not what "
            f"config.json says: {rewriting.what}"
        )
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
