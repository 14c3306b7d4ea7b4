"""Read a checkpoint's own tokenizer: as transformers does, or as its tokenizer.json says."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, normalizers

from qrank.converters.checkpoint.configuration import is_causal, transformers_for
from qrank.converters.checkpoint.json_files import check_kinds, explained, read_json
from qrank.converters.checkpoint.probes import probe_pairs
from qrank.converters.checkpoint.tokenizer import is_control
from qrank.errors import ConversionError, FamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("qrank")

_NAMED = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")

_KINDS: dict[str, tuple[type, ...]] = {
    "auto_map": (dict,),
    "chat_template": (str, list, dict, NoneType),
    "do_lower_case": (bool, NoneType),
    "model_input_names": (list,),
    "model_max_length": (int, float, NoneType),
    "tokenizer_class": (str, NoneType),
    "truncation_side": (str,),
}
"""Types that transformers accepts for keys of tokenizer_config.json that change ids."""

_ODD = (
    "ＦＵＬＬ　ｗｉｄｔｈ ﬁne ①② ™ ½",
    "Ångström naïve E\u0301cole CAFÉ",
    "  two  spaces,\ttabs\r\n\nand lines  ",
    "中文字,日本語の文 한국어 किताब مرحبا",
    "don't 3.14 a_b x-y <b>#1</b> $5 🪐👩‍🚀 \u200b\u00a0end",
)
"""Texts that normalizers and pre-tokenizers treat differently."""


def read_tokenizer(
    folder: Path, source: str, config: dict[str, Any], settings: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer that a checkpoint's author used, in transformers' class.

    transformers 5 rebuilds most tokenizers from the vocabulary in tokenizer.json, with the
    normalizer and pre-tokenizer of its class; earlier versions and other programs use the file
    unchanged. If the two read some text differently, the file counts.

    Args:
        folder: the checkpoint's folder.
        source: the checkpoint's name in errors.
        config: its config.json.
        settings: the same with transformers' defaults.

    Raises:
        ConversionError: there is no tokenizer, or it is damaged.
        FamilyError: it reads text in a way that qrank does not support.
    """
    transformers = transformers_for(config)
    _check_config(folder, source)
    files = "its tokenizer (tokenizer.json, tokenizer_config.json)"
    with explained(f"transformers cannot read {source}, {files}"), warnings.catch_warnings():
        # When it reads a vocab.txt, it warns about its own method.
        warnings.simplefilter("ignore", DeprecationWarning)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, config=settings, local_files_only=True, trust_remote_code=False
        )
        # A hieroglyph: if it is unknown, there must be an unknown token.
        tokenizer("\U00013000")
    # Without files, transformers makes up a tokenizer of special tokens only.
    if not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ConversionError(f"{source} has no tokenizer.json, and none can be made from it")
    tokenizer = _as_written(folder, source, tokenizer, pairs=not is_causal(config))
    _check(tokenizer, source)
    read: PreTrainedTokenizerBase = tokenizer
    return read


def _check_config(folder: Path, source: str) -> None:
    """Check the types of the keys in tokenizer_config.json that qrank uses.

    Raises:
        ConversionError: a key has another type, or truncation_side another value.
    """
    if not (path := folder / "tokenizer_config.json").is_file():
        return
    content = read_json(path, dict, source)
    named = dict.fromkeys((f"{name}_token" for name in _NAMED), (str, dict, NoneType))
    check_kinds(content, named | _KINDS, path.name, source)
    if (side := content.get("truncation_side", "right")) not in ("left", "right"):
        raise ConversionError(
            f"{source}: {path.name} has truncation_side = {side!r}; expected 'left' or 'right'"
        )


def control_tokens(tokenizer: PreTrainedTokenizerBase, items: Iterable[str] = ()) -> dict[str, int]:
    """Added tokens that steer the model, with their ids; see `tokenizer.is_control`.

    Args:
        tokenizer: the checkpoint's own.
        items: items of the card's templates.
    """
    templates = [*items, *_chat_templates(tokenizer)]
    named = set(tokenizer.all_special_tokens)
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if is_control(token.content, token.special or token.content in named, templates)
    }


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = tokenizer.chat_template
    if isinstance(found, dict):
        return [str(text) for text in found.values()]
    return [] if found is None else [str(found)]


def _check(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Check that tokenizer_config.json has no value that changes ids and that qrank ignores."""
    name = f"{source}: tokenizer_config.json has"
    if tokenizer.truncation_side != "right":
        raise FamilyError(
            f"{name} truncation_side = {tokenizer.truncation_side!r}, by which texts that are too "
            "long lose their beginning; qrank keeps it: set 'right' there, or delete the key"
        )
    limit = tokenizer.model_max_length
    if type(limit) not in (int, float) or limit < 1:
        raise FamilyError(f"{name} model_max_length = {limit!r}; expected a number from 1 on")


def _as_written(
    folder: Path, source: str, rebuilt: PreTrainedTokenizerBase, *, pairs: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json if transformers' gives other ids, else transformers'.

    Args:
        folder: the checkpoint's folder.
        source: the checkpoint's name in a warning.
        rebuilt: transformers' tokenizer.
        pairs: whether it joins queries and documents with special tokens.
    """
    import transformers

    path = folder / "tokenizer.json"
    # This class uses the file unchanged.
    if not path.is_file() or type(rebuilt) is transformers.TokenizersBackend:
        return rebuilt
    backend = rebuilt.backend_tokenizer
    with explained(f"tokenizers cannot read {path}"):
        written = Tokenizer.from_file(str(path))
        if {type(t.normalizer) for t in (backend, written)} == {normalizers.BertNormalizer}:
            # Every version of transformers sets its options from tokenizer_config.json.
            content = json.loads(path.read_text("utf-8"))
            content["normalizer"] = json.loads(backend.normalizer.__getstate__())
            written = Tokenizer.from_str(json.dumps(content))
    special = set(rebuilt.all_special_tokens)
    words = {
        token.content
        for tokenizer in (backend, written)
        for token in tokenizer.get_added_tokens_decoder().values()
        if not is_control(token.content, token.special or token.content in special)
    }
    texts = [*_ODD, *(f"a {word} b{word}c" for word in sorted(words))]
    for query, document in [*probe_pairs(), *((text, text) for text in texts)]:
        a, b = (t.encode(query, document, add_special_tokens=pairs) for t in (backend, written))
        if (a.ids, a.type_ids) != (b.ids, b.type_ids):
            break
    else:
        return rebuilt
    log.warning(
        "%s: transformers %s reads some texts as other tokens than the checkpoint's tokenizer.json "
        "does; qrank takes the file, as earlier versions of transformers do",
        source,
        transformers.__version__,
    )
    return transformers.TokenizersBackend(
        tokenizer_object=written,
        added_tokens_decoder=rebuilt.added_tokens_decoder,
        chat_template=rebuilt.chat_template,
        model_input_names=rebuilt.model_input_names,
        model_max_length=rebuilt.model_max_length,
        truncation_side=rebuilt.truncation_side,
        **rebuilt.special_tokens_map,
    )
