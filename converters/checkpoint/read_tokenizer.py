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
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("qrank")

NAMED = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")
"""Roles of special tokens in tokenizer_config.json."""

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

SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
"""Names of sentencepiece's files, from which a tokenizer is made if there is no tokenizer.json."""

_OPTIONS = {
    "normalizer": ("BertNormalizer", ("handle_chinese_chars", "lowercase", "strip_accents")),
    "pre_tokenizer": ("ByteLevel", ("add_prefix_space",)),
}
"""Parts of a tokenizer.json, by kind, whose options tokenizer_config.json sets: BERT's and
RoBERTa's."""

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
    unchanged, except for a few options. Unless the two are the same, the file counts.

    Args:
        folder: the checkpoint's folder.
        source: the checkpoint's name in errors.
        config: its config.json.
        settings: the same with transformers' defaults.

    Raises:
        ConversionError: there is no tokenizer, or it is damaged.
        MissingExtraError: it is a file of sentencepiece, which is not installed.
        FamilyError: it reads text in a way that qrank does not support.
    """
    transformers = transformers_for(config)
    _check_config(folder, source)
    pieces = _sentencepiece_file(folder)
    if pieces is not None:
        # Without it, transformers reads the file as another format.
        need("sentencepiece")
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
    if pieces is None:
        tokenizer = _as_written(folder, source, tokenizer, pairs=not is_causal(config))
    else:
        _add_charsmap(tokenizer.backend_tokenizer, pieces)
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
    named = dict.fromkeys((f"{name}_token" for name in NAMED), (str, dict, NoneType))
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


def _sentencepiece_file(folder: Path) -> Path | None:
    """The file that a checkpoint's tokenizer is made from, if it is one of sentencepiece."""
    if (folder / "tokenizer.json").is_file():
        return None
    return next((path for name in SENTENCEPIECE if (path := folder / name).is_file()), None)


def _add_charsmap(tokenizer: Tokenizer, pieces: Path) -> None:
    """Normalize text as a file of sentencepiece says, if transformers left that out.

    transformers 5 does for DeBERTa and CamemBERT; earlier versions and sentencepiece do not.
    """
    model = need("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(pieces.read_bytes())
    charsmap = model.normalizer_spec.precompiled_charsmap
    theirs = tokenizer.normalizer
    if charsmap and b'"Precompiled"' not in (b"" if theirs is None else theirs.__getstate__()):
        mapped = normalizers.Precompiled(charsmap)
        tokenizer.normalizer = normalizers.Sequence([mapped, *([] if theirs is None else [theirs])])


def _as_written(
    folder: Path, source: str, rebuilt: PreTrainedTokenizerBase, *, pairs: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json, unless transformers' is the same; warns of other ids.

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
        written = _with_options(written, backend)
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
            log.warning(
                "%s: transformers %s reads some texts as other tokens than the checkpoint's "
                "tokenizer.json does; qrank takes the file, as earlier versions of transformers do",
                source,
                transformers.__version__,
            )
            break
    else:
        # Texts cannot show every difference: the rules must be the same, too.
        if _rules(backend) == _rules(written):
            return rebuilt
    return transformers.TokenizersBackend(
        tokenizer_object=written,
        added_tokens_decoder=rebuilt.added_tokens_decoder,
        chat_template=rebuilt.chat_template,
        model_input_names=rebuilt.model_input_names,
        model_max_length=rebuilt.model_max_length,
        truncation_side=rebuilt.truncation_side,
        **rebuilt.special_tokens_map,
    )


def _with_options(written: Tokenizer, rebuilt: Tokenizer) -> Tokenizer:
    """The file's tokenizer with the options that tokenizer_config.json sets in every transformers.

    transformers' class reads them, and has put them into `rebuilt`.
    """
    content, theirs = (json.loads(tokenizer.to_str()) for tokenizer in (written, rebuilt))
    for part, (kind, names) in _OPTIONS.items():
        if all((t[part] or {}).get("type") == kind for t in (content, theirs)):
            content[part] |= {name: theirs[part][name] for name in names}
    return Tokenizer.from_str(json.dumps(content))


def _rules(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """What splits text into tokens, other than added tokens."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)
    return tuple(b"" if part is None else part.__getstate__() for part in parts)
