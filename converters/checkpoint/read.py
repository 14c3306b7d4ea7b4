"""Find or download a checkpoint, match it to a card and combine the two."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrank.bundle.description import Description
from qrank.bundle.dimensions import Dimensions
from qrank.bundle.family import Family
from qrank.bundle.locate import Fetched, fetch, place
from qrank.bundle.manifest import Source
from qrank.converters.checkpoint import logit_score, module_chain, sentence_transformers
from qrank.converters.checkpoint.attention import window
from qrank.converters.checkpoint.card import Card, find_card
from qrank.converters.checkpoint.concrete import Said, check_case, concrete
from qrank.converters.checkpoint.configuration import (
    is_causal,
    is_language_model,
    read_rewriting,
    read_settings,
    whole_number,
)
from qrank.converters.checkpoint.json_files import explained
from qrank.converters.checkpoint.logit_score import logit_score_card
from qrank.converters.checkpoint.model_card import CARD, read_card
from qrank.converters.checkpoint.qwen_vl import HYBRID
from qrank.converters.checkpoint.read_tokenizer import (
    NAMED,
    SENTENCEPIECE,
    control_tokens,
    read_tokenizer,
)
from qrank.converters.checkpoint.refusals import INFERENCE
from qrank.converters.checkpoint.sentence_transformers import read_metadata
from qrank.converters.checkpoint.stored import INDEX
from qrank.converters.checkpoint.tokenizer import strip_special_tokens
from qrank.converters.checkpoint.weights import (
    load_model,
    refuse_adapter,
    upcast_lazily,
    weight_files,
)
from qrank.errors import FamilyError
from qrank.system import machine
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ROOMY = 3
"""How often the weights must fit into free memory in fp32 to be held so: variants are made beside
them. Upcasting every matrix for every pair takes a tenth to a quarter of a reference of 0.6 billion
parameters."""

DESCRIPTION = [
    *sentence_transformers.FILES,
    *module_chain.FILES,
    *SENTENCEPIECE,
    logit_score.CONFIG,
    CARD,
    "adapter_config.json",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
"""The files that describe a model: all but its weights. Listed by name because repositories also
hold other formats in subfolders."""

WEIGHTS = ["model*.safetensors", INDEX, *module_chain.WEIGHTS]
"""The files that hold weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and what its files say about it.

    Attributes:
        folder: holds config.json, safetensors files and the tokenizer.
        source: where it comes from.
        config: config.json of the class that it is read as.
        family: the card that reads it, made concrete.
        tokenizer: its own tokenizer, in transformers' class.
        control: its added tokens that no text may become.
        card: the card that the family was made from.
        dimensions: the sizes that determine the memory of batches.
        window: the sliding window of a causal model's layers in tokens; None if all see everything.
        read_as: what is read as which other class, for people; "" if it is read as it is.
    """

    folder: Path
    source: Source
    config: dict[str, Any]
    family: Family
    tokenizer: PreTrainedTokenizerBase
    control: frozenset[str]
    card: Card
    dimensions: Dimensions
    window: int | None
    read_as: str

    @property
    def name(self) -> str:
        """The last part of its id: `bge-reranker-base`."""
        return self.source.id.rpartition("/")[2]

    @property
    def words(self) -> tuple[str, ...]:
        """Words added to its vocabulary, in the order of their ids; without white space."""
        added = sorted(self.tokenizer.added_tokens_decoder.items())
        contents = [token.content for _, token in added]
        return tuple(text for text in contents if text.strip() and text not in self.control)

    def tokenizer_json(self) -> dict[str, Any]:
        """Its tokenizer.json, as its tokenizer stands."""
        content: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return content

    def text_tokenizer(self) -> dict[str, Any]:
        """Its tokenizer.json with everything but text removed.

        Raises:
            ConversionError: the kind of tokenizer is unknown, or ids cannot be kept.
        """
        return strip_special_tokens(self.tokenizer_json(), self.control)

    def description(self) -> Description | None:
        """What `qrank export` needs of it; None if no other program could load the model."""
        if not self.family.pair:
            return None
        named = {role: getattr(self.tokenizer, f"{role}_token") for role in NAMED}
        return Description(
            config=self.config,
            added_tokens=self.tokenizer_json()["added_tokens"],
            special={role: token for role, token in named.items() if token is not None},
            card=read_card(self.folder),
        )

    def parameters(self) -> int:
        """The number of parameters, read from the headers of the weight files.

        Raises:
            ConversionError: a file is damaged.
        """
        safetensors = need("safetensors")
        total = 0
        for path in weight_files(self.folder, self.source.id):
            damaged = explained(f"safetensors cannot read {path}")
            with damaged, safetensors.safe_open(path, "pt") as file:
                names = list(file.keys())
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        return total

    def load(self, *, lean: bool = False) -> PreTrainedModel:
        """transformers' own model: the fp32 reference and the source of exports.

        Args:
            lean: keep a decoder's matrices in their stored data type and upcast each to fp32 when
                it is used: identical results in half the memory.

        Raises:
            ConversionError: the weights do not fit the architecture.
        """
        # Eager attention is plain matrix products and a softmax: exact, and every runtime has them.
        if lean and self.family.decoder:
            return upcast_lazily(load_model(self.folder, dtype="auto", attention="eager"))
        return load_model(self.folder, dtype="float32", attention="eager")

    def load_to_run(self) -> PreTrainedModel:
        """transformers' own model for many forward passes: `lean` only where memory asks for it.

        Raises:
            ConversionError: the weights do not fit the architecture.
        """
        free = machine.free_memory()
        return self.load(lean=free is None or free < _ROOMY * 4 * self.parameters())


def read_checkpoint(
    source: str, *, family: str | None = None, revision: str | None = None, offline: bool = False
) -> Checkpoint:
    """Find a checkpoint and make its family concrete. No weights are loaded yet.

    Args:
        source: a folder or a name on the hub; see `qrank.bundle.locate.place`.
        family: a card's name or file; None to match by config.json.
        revision: revision of the hub repository.
        offline: use only what is already downloaded.

    Raises:
        ModelNotFoundError: nothing of that name exists, or it is a bundle.
        FamilyError: no card reads it, it has not exactly one label, or there are no safetensors.
    """
    where = place(source, revision)
    return of_fetched(fetch(where, source, [*DESCRIPTION, *WEIGHTS], offline=offline), family)


def of_fetched(found: Fetched, family: str | None) -> Checkpoint:
    """The same as `read_checkpoint` for a checkpoint that is already found or downloaded."""
    source = found.id if found.commit else str(found.folder)
    return describe(
        found.folder, found.id, found.commit, family, lambda: weight_files(found.folder, source)
    )


def check_description(found: Fetched, family: str | None) -> None:
    """Check all but a checkpoint's weights, before they are downloaded; raises as `describe`."""
    describe(found.folder, found.id, found.commit, family, lambda: [])


def describe(
    folder: Path,
    identity: str,
    commit: str | None,
    family: str | None,
    weights: Callable[[], list[Path]],
) -> Checkpoint:
    """The checkpoint that a folder's configuration and tokenizer describe.

    Args:
        folder: holds config.json and the tokenizer.
        identity: hub id, or the name to use.
        commit: the hub's commit; None if not from the hub.
        family: a card's name or file; None to match by config.json.
        weights: finds the files that hold the model; called after the configuration is read and
            matched to a card.

    Raises:
        FamilyError: no card reads it, it has not exactly one label, or there are no weights.
    """
    source = identity if commit else str(folder)
    refuse_adapter(folder, source)
    rewriting = read_rewriting(folder, source)
    config = rewriting.config
    metadata = read_metadata(folder, source)
    settings = cache(partial(read_settings, config, source))
    tokenizer = cache(lambda: read_tokenizer(folder, source, config, settings()))
    causal = is_causal(config)
    if family is None and causal and metadata.logit_score is not None:
        card = logit_score_card(folder, source, config, metadata, tokenizer())
    else:
        card = find_card(family or rewriting.family, config, identity if commit else None)
    if config.get("model_type") in HYBRID:
        card = replace(card, unsupported=("onnx", "openvino", "mlx"))
    if not is_language_model(config):
        _check_labels(settings(), card, source)
    files = weights()
    control = control_tokens(tokenizer(), [*card.template, *card.instructed])
    said = Said(source, config, settings(), metadata, tokenizer(), control)
    check_case(said)
    made = concrete(card, said)
    _check_embeddings(said, made)
    return Checkpoint(
        folder=folder,
        source=Source(identity, commit, _fingerprint(config, tokenizer(), files)),
        config=config,
        family=made,
        tokenizer=tokenizer(),
        control=frozenset(control),
        card=card,
        dimensions=_dimensions(settings(), causal, source),
        window=window(settings(), made.max_length, source) if made.decoder else None,
        read_as=rewriting.about,
    )


def _check_labels(settings: PretrainedConfig, card: Card, source: str) -> None:
    names = {str(name).lower() for name in settings.id2label.values()}
    if names >= INFERENCE:
        raise FamilyError(
            f"{source} has the labels {', '.join(settings.id2label.values())} (id2label in "
            "config.json): it tells entailment from contradiction (NLI), which ranks nothing. Use "
            "a reranker, such as cross-encoder/ettin-reranker-32m-v1"
        )
    count, expected = settings.num_labels, len(card.classes) or 1
    if count != expected:
        two = ". If one of the two means relevant: --family bert-two-labels, or a card with classes"
        raise FamilyError(
            f"{source} has {count} labels (id2label, num_labels in config.json); family "
            f"{card.name} has {expected}: it is a classifier, or a model without a trained head"
            f"{two if count == 2 else ''}"
        )


def _check_embeddings(said: Said, family: Family) -> None:
    """Check that the model has an embedding for every token of a text or the template.

    Raises:
        FamilyError: tokens were added only to the tokenizer; the original fails on them.
    """
    rows = whole_number(said.settings, "vocab_size", said.source)
    beyond = {
        text: number
        for text, number in said.tokenizer.get_vocab().items()
        if number >= rows and (text not in said.control or number in family.template)
    }
    if beyond:
        text = min(beyond, key=lambda text: beyond[text])
        raise FamilyError(
            f"{said.source}: the token {text!r} has the id {beyond[text]}, and the model has "
            f"{rows} embeddings (vocab_size in config.json): after adding tokens, call "
            "resize_token_embeddings and train it"
        )


def _dimensions(settings: PretrainedConfig, causal: bool, source: str) -> Dimensions:
    """The sizes that determine the memory of batches, by transformers' common names."""
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    found = {key: whole_number(settings, key, source) for key in keys}
    # Its name is `hidden_dim` in DistilBERT and `d_ff` in T5; it is usually four times the hidden
    # size.
    names = ("intermediate_size", "hidden_dim", "d_ff")
    given = [name for name in names if getattr(settings, name, None) is not None]
    wide = whole_number(settings, given[0], source) if given else 4 * found["hidden_size"]
    found["intermediate_size"] = wide
    for key in ("num_key_value_heads", "head_dim"):
        if getattr(settings, key, None) is not None:
            found[key] = whole_number(settings, key, source)
    return Dimensions.of(found, causal)


def _fingerprint(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, weights: list[Path]
) -> str:
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    total.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in weights:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
