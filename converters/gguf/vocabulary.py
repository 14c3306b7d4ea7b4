"""A tokenizer in llama.cpp's form, so that other programs can run a GGUF file on text.

qrank itself runs every file on ids. Names do not tell whether llama.cpp produces the same ids, so
`same_ids` runs it to find out.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from qrank.backends.llama import library
from qrank.bundle.family import fill
from qrank.converters.checkpoint.read import Checkpoint
from qrank.system.extras import need

if TYPE_CHECKING:
    import gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_WORD_START = "\u2581"


@dataclass(frozen=True)
class _Vocabulary:
    """Pieces by id, and what else llama.cpp needs for a kind of tokenizer."""

    model: str
    pieces: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool = False
    lowercase: bool | None = None
    charsmap: bytes = b""


def write_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint, size: int) -> None:
    """Add a text-only tokenizer, as in a bundle, to a file's metadata.

    Args:
        writer: the file's writer; nothing is written yet.
        checkpoint: the checkpoint with the tokenizer.
        size: rows of the embedding table; ids without a piece become unused tokens.
    """
    vocabulary = _read(checkpoint, size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(_pre(checkpoint) if vocabulary.model == "gpt2" else "default")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_remove_extra_whitespaces(vocabulary.space_prefix)
    if vocabulary.lowercase is not None:
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", vocabulary.lowercase)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    tokenizer = checkpoint.tokenizer
    if checkpoint.family.decoder:
        # The template for reranking contains all special tokens.
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        return
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    writer.add_bos_token_id(cls)
    writer.add_eos_token_id(sep)
    writer.add_sep_token_id(sep)
    for number, add in (
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.mask_token_id, writer.add_mask_token_id),
    ):
        if number is not None:
            add(number)
    # llama-server joins bos, query, eos, sep, document, eos; special tokens only if flagged.
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(len(_between(checkpoint)) == 2)


def rerank_template(checkpoint: Checkpoint) -> str:
    """A decoder's prompt for llama-server to fill in, with special tokens spelled out."""
    family = checkpoint.family
    return "".join(
        checkpoint.tokenizer.convert_ids_to_tokens(item)
        if isinstance(item, int)
        else fill(item, instruction=family.instruction)
        for item in family.template
    )


def same_ids(checkpoint: Checkpoint, size: int, pairs: list[tuple[str, str]]) -> bool:
    """Whether llama.cpp, given the vocabulary, joins and tokenizes texts to the ids of qrank."""
    template = checkpoint.family.template
    cls, sep = checkpoint.tokenizer.cls_token_id, checkpoint.tokenizer.sep_token_id
    decoder = checkpoint.family.decoder
    fitting = ((cls, "{query}", *[sep] * n, "{document}", sep) for n in (1, 2))
    if not decoder and template not in fitting:
        return False
    ours = Tokenizer.from_str(json.dumps(checkpoint.text_tokenizer()))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = need("gguf").GGUFWriter(path, "bert")
        write_vocabulary(writer, checkpoint, size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        llama = library()
        settings = llama.llama_model_default_params()
        settings.vocab_only = True
        model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        return False
    try:
        vocabulary = llama.llama_model_get_vocab(model)
        if not all(
            _tokenize(llama, vocabulary, text) == ours.encode(text, add_special_tokens=False).ids
            for pair in pairs
            for text in pair
        ):
            return False
        return not decoder or all(
            _tokenize(
                llama, vocabulary, fill(rerank_template(checkpoint), query=q, document=d), True
            )
            == _prompt_ids(checkpoint, ours, q, d)
            for q, d in pairs
        )
    finally:
        llama.llama_model_free(model)


def _prompt_ids(checkpoint: Checkpoint, ours: Tokenizer, query: str, document: str) -> list[int]:
    """A whole prompt in qrank's ids, not truncated."""
    family = checkpoint.family
    texts = {"query": query, "document": document, "instruction": family.instruction}
    items = [
        [item]
        if isinstance(item, int)
        else ours.encode(fill(item, **texts), add_special_tokens=False).ids
        for item in family.template
    ]
    return [number for item in items for number in item]


def _pre(checkpoint: Checkpoint) -> str:
    """llama.cpp's name of the pre-tokenizer; `same_ids` detects a wrong one."""
    return "qwen2" if checkpoint.family.decoder else "modern-bert"


def _tokenize(llama: Any, vocabulary: Any, text: str, special: bool = False) -> list[int]:
    data = text.encode()
    ids = (llama.llama_token * (len(data) + 1))()
    count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, special)
    return list(ids[:count])


def _between(checkpoint: Checkpoint) -> tuple[int | str, ...]:
    template = checkpoint.family.template
    return template[template.index("{query}") + 1 : template.index("{document}")]


def _original(checkpoint: Checkpoint) -> dict[str, Any]:
    content = checkpoint.tokenizer_json()
    return content


def _read(checkpoint: Checkpoint, size: int) -> _Vocabulary:
    original = _original(checkpoint)
    model = original["model"]
    listed = model["vocab"]
    if model["type"] == "Unigram":
        numbered = {number: piece for number, (piece, _) in enumerate(listed)}
    else:
        numbered = {number: piece for piece, number in listed.items()}
    types = dict.fromkeys(numbered, _NORMAL)
    for token in original["added_tokens"]:
        # Words and white space are text (see qrank.converters.checkpoint.tokenizer).
        numbered[token["id"]] = token["content"]
        control = token["content"] in checkpoint.control
        types[token["id"]] = _CONTROL if control else _USER_DEFINED
    unknown = checkpoint.tokenizer.unk_token_id
    if unknown is not None:
        types[unknown] = _UNKNOWN
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        for number, kind in types.items():
            if kind == _NORMAL:
                numbered[number] = _phantom(numbered[number], prefix)
    # llama.cpp aborts the process if two tokens have the same spelling.
    spelled: set[str] = set()
    pieces = []
    for number in range(size):
        piece = numbered.get(number, f"[PAD{number}]")
        if piece in spelled:
            piece = f"[PAD{number}]"
        spelled.add(piece)
        pieces.append(piece)
    kinds = [types.get(number, _UNUSED) for number in range(size)]
    if model["type"] == "WordPiece":
        lowercase = (original["normalizer"] or {}).get("lowercase", False)
        return _Vocabulary("bert", pieces, kinds, lowercase=lowercase)
    if model["type"] == "BPE":
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        return _Vocabulary("gpt2", pieces, kinds, merges=merges)
    scores = [float(score) for _, score in listed] + [-10_000.0] * (size - len(listed))
    return _Vocabulary(
        "t5", pieces, kinds, scores=scores[:size], space_prefix=True, charsmap=_charsmap(original)
    )


def _phantom(piece: str, prefix: str) -> str:
    """A WordPiece piece as llama.cpp marks it: at the start of a word, not in its continuation."""
    return piece.removeprefix(prefix) if piece.startswith(prefix) else _WORD_START + piece


def _charsmap(original: dict[str, Any]) -> bytes:
    for normalizer in _flat(original["normalizer"]):
        if normalizer["type"] == "Precompiled":
            return base64.b64decode(normalizer["precompiled_charsmap"])
    return b""


def _flat(normalizer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if normalizer is None:
        return
    if normalizer["type"] == "Sequence":
        for inner in normalizer["normalizers"]:
            yield from _flat(inner)
    else:
        yield normalizer
