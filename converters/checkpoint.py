"""Find or download a checkpoint, match it to a card, and load it the way transformers does."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.bundle import Source
from qrank.converters import logit_score
from qrank.errors import ConversionError, FamilyError, ModelNotFoundError
from qrank.extras import need
from qrank.family import POOLINGS, ROLES, Card, Family, find_card
from qrank.hub import download, is_hub_id
from qrank.memory import Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = [
    *logit_score.FILES,
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]
"""What a model says of itself in: all but its weights. By name, as repositories hold other formats
in folders beside."""

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
"""What weights lie in."""

NEMOTRON = "llama_bidirec"
"""What `model_type` is where the class is `qrank.converters.nemotron`'s."""

_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and what it says of itself.

    Attributes:
        folder: holds config.json, safetensors files and the tokenizer.
        source: where it comes from.
        family: the card that reads it, made concrete.
        tokenizer: transformers' own.
        card: what the family was made of.
        dimensions: what decides the memory that batches take.
    """

    folder: Path
    source: Source
    family: Family
    tokenizer: PreTrainedTokenizerBase
    card: Card
    dimensions: Dimensions

    @property
    def name(self) -> str:
        """The last part of its id: `bge-reranker-base`."""
        return self.source.id.rpartition("/")[2]

    def parameters(self) -> int:
        """How many numbers its weights are, by the headers of their files.

        Raises:
            ConversionError: a file is damaged.
        """
        safetensors = need("safetensors")
        total = 0
        for path in _weights(self.folder, self.source.id):
            damaged = _explained(f"safetensors cannot read {path}")
            with damaged, safetensors.safe_open(path, "pt") as file:
                names = list(file.keys())
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        return total

    def load(self, *, lean: bool = False) -> PreTrainedModel:
        """transformers' own model: the fp32 reference, and what is exported.

        Args:
            lean: keep a decoder's matrices as they are stored, and widen each to fp32 as it is
                used: the same numbers in half the memory.

        Raises:
            ConversionError: the weights do not fit the architecture.
        """
        # Plain matrix products and a softmax: exact, and every runtime knows them.
        if lean and self.family.decoder:
            return widened(load_model(self.folder, dtype="auto", attention="eager"))
        return load_model(self.folder, dtype="float32", attention="eager")


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """A model that computes in fp32 with linear layers' weights as they are stored."""
    torch = need("torch")

    class Widened(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.linear(x, self.weight.float(), bias)

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Widened
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    module.register_buffer(name, buffer.float(), persistent=False)
    return model


def load_model(folder: Path, *, dtype: str, attention: str) -> PreTrainedModel:
    """transformers' own model of a checkpoint.

    Args:
        folder: the checkpoint's.
        dtype: torch's name of it.
        attention: transformers' name of the implementation.

    Raises:
        ConversionError: the weights do not fit the architecture.
    """
    config = read_config(folder)
    transformers_for(config).utils.logging.disable_progress_bar()
    with _explained(f"transformers cannot load {folder}"):
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(
            f"{folder} lacks weights of {type(model).__name__}: {', '.join(missing)}; "
            "is it a reranker?"
        )
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def transformers_for(config: dict[str, Any]) -> Any:
    """transformers, made to know the class of a config.json where that is ours.

    Only there: that takes torch, which a ready-made model does not.
    """
    transformers = need("transformers")
    if config.get("model_type") == NEMOTRON:
        need("torch")
        import qrank.converters.nemotron  # noqa: F401 (by being imported)
    return transformers


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' class that makes a model of a config.json."""
    transformers = transformers_for(config)
    if _is_causal(config):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


def _is_causal(config: dict[str, Any]) -> bool:
    return str((config.get("architectures") or [""])[0]).endswith("ForCausalLM")


def read_checkpoint(
    source: str, *, family: str | None = None, revision: str | None = None, offline: bool = False
) -> Checkpoint:
    """Find a checkpoint and make its family concrete. No weights are loaded yet.

    Args:
        source: a folder, or a hub id.
        family: a card's name or file; None to match by config.json.
        revision: of the hub's repository.
        offline: use what was downloaded before only.

    Raises:
        ModelNotFoundError: neither a folder nor a hub id.
        FamilyError: no card reads it; or not one label; or no safetensors.
    """
    folder, commit = fetch(source, [*DESCRIPTION, *WEIGHTS], revision=revision, offline=offline)
    identity = source if commit else folder.resolve().name
    return describe(folder, identity, commit, family, lambda: _weights(folder, source))


def fetch(
    source: str, files: list[str], *, revision: str | None = None, offline: bool = False
) -> tuple[Path, str | None]:
    """The folder of a source, and of the hub's the commit.

    Args:
        source: a folder, or a hub id.
        files: of the hub's repository; names or patterns.
        revision: of the hub's repository.
        offline: use what was downloaded before only.

    Raises:
        ModelNotFoundError: neither a folder nor a hub id.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ModelNotFoundError(f"{source} is a folder; --revision is for hub ids")
        return folder, None
    if is_hub_id(source):
        folder = download(source, files, revision=revision, offline=offline)
        return folder, folder.name
    raise ModelNotFoundError(f"{source} is neither a folder nor a hub id (owner/name)")


def describe(
    folder: Path,
    identity: str,
    commit: str | None,
    family: str | None,
    weights: Callable[[], list[Path]],
) -> Checkpoint:
    """What a folder's configuration and tokenizer come to.

    Args:
        folder: holds config.json and the tokenizer.
        identity: hub id, or the name it shall go by.
        commit: the hub's; None of what is no hub's.
        family: a card's name or file; None to match by config.json.
        weights: finds the files that the model is in; asked when all else is understood.

    Raises:
        FamilyError: no card reads it; or not one label; or there are no weights.
    """
    source = identity if commit else str(folder)
    config = read_config(folder, source)
    read_tokenizer = cache(partial(_tokenizer, folder, source, config))
    card = None
    if family is None and _is_causal(config):
        card = logit_score.logit_score_card(folder, config, read_tokenizer)
    card = card or find_card(family, config, identity if commit else None)
    if not _is_causal(config):
        _check_labels(config, source)
    files = weights()
    tokenizer = read_tokenizer()
    return Checkpoint(
        folder=folder,
        source=Source(identity, commit, _fingerprint(config, tokenizer, files)),
        family=_concrete(card, config, tokenizer),
        tokenizer=tokenizer,
        card=card,
        dimensions=Dimensions.of(config, _is_causal(config)),
    )


def _tokenizer(folder: Path, source: str, config: dict[str, Any]) -> PreTrainedTokenizerBase:
    transformers = transformers_for(config)
    with _explained(f"transformers cannot read {source}"), warnings.catch_warnings():
        # Reading a vocab.txt, it warns of its own way to do so.
        warnings.simplefilter("ignore", DeprecationWarning)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Without files, transformers makes up a tokenizer of special tokens alone.
    if not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ConversionError(f"{source} has no tokenizer.json, and none can be made from it")
    read: PreTrainedTokenizerBase = tokenizer
    return read


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever transformers raises on a damaged checkpoint into a ConversionError."""
    try:
        yield
    except Exception as error:  # OSError, TypeError, SafetensorError, ...: they share no base
        reason = " ".join(str(error).split())
        raise ConversionError(f"{what}: {reason}") from error


def read_config(folder: Path, source: str | None = None) -> dict[str, Any]:
    """The config.json of a folder.

    Args:
        folder: a checkpoint's.
        source: what to call it in an error; None: as the folder.

    Raises:
        ModelNotFoundError: there is none.
        ConversionError: it is no JSON object.
    """
    source = source or str(folder)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{source} is no checkpoint: it holds no config.json") from None
    except ValueError as error:
        raise ConversionError(f"{source}: config.json is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{source}: config.json is not a JSON object")
    return config


def _check_labels(config: dict[str, Any], source: str) -> None:
    # Without either key, transformers' own default is two.
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise FamilyError(
            f"{source} has {labels} labels; a reranker has one: it is a classifier, "
            "or a model without a trained head"
        )


def _weights(folder: Path, source: str) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise FamilyError(
            f"{source} has no *.safetensors file (found: {', '.join(others) or 'no weights'}); "
            "qrank reads no pickles: save the model again with save_pretrained"
        )
    return weights


def _fingerprint(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, weights: list[Path]
) -> str:
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    total.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in weights:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _concrete(card: Card, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Family:
    """Fill in a card with what the checkpoint's configuration says."""
    numbers = {
        f"{{{role}}}": getattr(tokenizer, f"{role}_token_id")
        for role in ROLES
        if f"{{{role}}}" in card.template
    }
    if missing := [role.strip("{}") for role, number in numbers.items() if number is None]:
        raise FamilyError(f"the tokenizer names no {', '.join(missing)} token")
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    numbers |= {text: number for text, number in added.items() if text.strip()}
    for item in (*card.template, *card.instructed):
        if item not in numbers and (held := [text for text in numbers if text in item]):
            raise FamilyError(
                f"card {card.name}: {item!r} holds the special token {held[0]}; make it an item"
            )
    labels = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in card.labels]
    if longer := [label for label, ids in zip(card.labels, labels, strict=True) if len(ids) != 1]:
        raise FamilyError(
            f"the label {longer[0]!r} of family {card.name} is no single token of this tokenizer"
        )

    def made(template: tuple[str, ...]) -> tuple[int | str, ...]:
        return tuple(numbers.get(item, item) for item in template)

    return Family(
        name=card.name,
        architecture=config["architectures"][0],
        template=made(card.template),
        segments=card.segments if card.segments and config.get("type_vocab_size", 2) > 1 else None,
        max_length=_max_length(card, config, tokenizer),
        pooling=_pooling(card, config),
        activation=_activation(card, config),
        temperature=card.temperature,
        instruction=card.instruction,
        instructed=made(card.instructed) or None,
        labels=tuple(ids[0] for ids in labels) if _is_causal(config) else (),
    )


def _max_length(card: Card, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    positions: int = config["max_position_embeddings"]
    if card.positions_after_pad:
        positions -= config["pad_token_id"] + 1
    # transformers says "no limit" by a very large number.
    return min(positions, int(tokenizer.model_max_length), card.max_length or positions)


def _pooling(card: Card, config: dict[str, Any]) -> str:
    if card.pooling in POOLINGS:
        return card.pooling
    value = config.get(card.pooling)
    if value not in POOLINGS:
        raise FamilyError(
            f"config.json has {card.pooling} = {value!r}; supported are: {', '.join(POOLINGS)}"
        )
    pooling: str = value
    return pooling


def _activation(card: Card, config: dict[str, Any]) -> str:
    """What the checkpoint says its scores go through (sentence-transformers' keys), or the card."""
    named = config.get("sentence_transformers", {}).get("activation_fn")
    named = named or config.get("sbert_ce_default_activation_function")
    if named is None:
        return card.activation
    if named not in _ACTIVATIONS:
        raise FamilyError(
            f"config.json names the activation {named}; supported are: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[named]
