"""The public door: a query and documents in, a ranking out. The one place the pieces meet."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, get_args, overload

import numpy as np

from qrank import activation, backends
from qrank.bundle import TOKENIZER, Manifest, check_files
from qrank.encoding import Encoder
from qrank.errors import InputError, TargetError
from qrank.locate import DEFAULT, locate
from qrank.selection import Target, choose, ready
from qrank.work import Ids, Logits, Segments, Work

LongDocuments = Literal["truncate", "tail", "chunk"]


@dataclass(frozen=True)
class Ranking:
    """One document of a ranked list.

    Attributes:
        index: its place in the list the caller gave, from 0.
        score: relevance, after the family's activation.
        logit: relevance as the model gives it; order and ties are decided on it.
        text: the document.
        truncated: whether the model read its beginning, or its end, only.
        part: the characters [start, end) that scored best, where it was cut into chunks.
    """

    index: int
    score: float
    logit: float
    text: str
    truncated: bool = False
    part: tuple[int, int] | None = None


class Item(NamedTuple):
    """One model input: (a part of) a document beside its query; `ids` follow the prefix."""

    owner: int
    prefix: Ids
    ids: Ids
    segments: Segments | None
    truncated: bool
    part: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        """Tokens the model reads for it, those of the prefix included."""
        return len(self.prefix) + len(self.ids)


class Reranker:
    """Scores (query, document) pairs with a bundle. Safe to use from several threads.

    After a fork the model is loaded again in the child at its first use: a runtime's threads do
    not survive a fork. Backend openvino refuses there: make the Reranker after the fork.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT,
        *,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        execution: str | None = None,
        max_length: int | None = None,
        family: str | None = None,
    ) -> None:
        """Load a bundle.

        Args:
            model: a bundled name, the folder `qrank convert` wrote, or a bundle's hub id; with
                backend `torch` a checkpoint's folder or hub id.
            backend: a format (`onnx`), a variant (`openvino-int8`), `torch` (or `torch-fp16`, ...)
                to run a checkpoint as it is, or "module:function" of your own (see
                `qrank.backends`). None: the preferred variant of the bundle.
            device: `cpu`, or what the backend offers: onnx `cuda`, `tensorrt`, `coreml`,
                `directml`; openvino `gpu`, `npu`; gguf `metal`, `cuda`, `vulkan`; torch `cuda`,
                `mps`. None: `cpu`.
            threads: CPU threads in all. None: every CPU this process may use.
            execution: arithmetic to compute in where the backend leaves a choice (openvino):
                `fp32`, `bf16` or `fp16`. None: the fastest that reproduces the probes here.
            max_length: tokens a pair may have. None: what the model reads.
            family: with backend `torch`: the card that reads the checkpoint, by name or file, where
                nothing in it tells. A bundle knows its own.

        Raises:
            QrankError: see `qrank.errors`; the message says what to do.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}; it must be 1 or more")
        tokenizer: Path | str
        if backend is not None and backend.partition("-")[0] == "torch":
            torch = backends.module("torch")
            folder, self.manifest, tokenizer = torch.as_bundle(str(model), family)
        else:
            if family is not None:
                raise InputError("family is for checkpoints (backend torch); a bundle has its own")
            folder = locate(model)
            self.manifest, tokenizer = Manifest.load(folder), folder / TOKENIZER
        self.target: Target = choose(self.manifest, backend, device)
        check_files(folder, {**self.manifest.files, **self.target.variant.files})
        self._options = backends.Options(
            threads or backends.processors(), execution, family=self.manifest.family
        )
        self._encoder = Encoder(
            tokenizer,
            self.manifest.family,
            max_length=max_length,
            threads=self._options.threads,
        )
        self._folder = folder
        self._custom = backend if backend and ":" in backend else None
        self._open = backends.opener(self._custom or self.format)
        self._lock = threading.Lock()
        self._backend: backends.Backend | None = None
        _living.add(self)
        self._ready()

    @property
    def format(self) -> str:
        """The format that runs, which names its backend."""
        return self.target.variant.format

    @property
    def threads(self) -> int:
        """CPU threads it may use."""
        return self._options.threads

    @property
    def max_length(self) -> int:
        """Tokens that a pair may have, the template's included."""
        return self._encoder.limit

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> list[Ranking]:
        """Order documents by relevance, most relevant first; equal ones keep their order.

        Args:
            query: cut with a warning (logger "qrank") where it alone exceeds the limit.
            documents: any number; empty and blank ones are scored like any other.
            top_k: keep only so many. None: all.
            instruction: what "relevant" means here, for families that take one (Qwen3-Reranker,
                zerank, mxbai-rerank-v2). None: the family's own, or none.
            long_documents: what becomes of a document that does not fit: `truncate` reads its
                beginning, `tail` its end, `chunk` scores overlapping parts and keeps the best.

        Raises:
            InputError: an argument is out of its range, a document is no string, or the family
                takes no instruction.
            TargetError: the backend failed, or gave a number that is not finite.
        """
        if top_k is not None and top_k < 0:
            raise InputError(f"top_k is {top_k}; it must be 0 or more")
        if isinstance(documents, str):
            raise InputError("documents is one string; give a list of strings")
        documents = list(documents)
        if not documents:
            return []
        pairs = [(query, document) for document in documents]
        items = self.prepare(pairs, instruction, long_documents)
        logits = self.logits(items)
        best = best_items([item.owner for item in items], logits)
        scores = self.scores(logits)
        # Stable, and on logits: scores may tie where an activation saturates.
        order = sorted(best, key=lambda i: -logits[i])[:top_k]
        return [
            Ranking(
                index=items[i].owner,
                score=float(scores[i]),
                logit=float(logits[i]),
                text=documents[items[i].owner],
                truncated=items[i].truncated,
                part=items[i].part,
            )
            for i in order
        ]

    @overload
    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        raw: Literal[False] = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> activation.Scores: ...

    @overload
    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        raw: Literal[True],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> Logits: ...

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        raw: bool = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> activation.Scores | Logits:
        """Score (query, document) pairs, in the caller's order.

        Args:
            pairs: queries may differ.
            raw: logits instead of scores.
            instruction: as for `rank`.
            long_documents: as for `rank`.

        Returns:
            float64 scores, or with `raw` float32 logits; shape [n].

        Raises:
            InputError, TargetError: as for `rank`.
        """
        items = self.prepare(list(pairs), instruction, long_documents)
        if not items:
            return np.empty(0, np.float32) if raw else np.empty(0, np.float64)
        logits = self.logits(items)
        logits = logits[best_items([item.owner for item in items], logits)]
        return logits if raw else self.scores(logits)

    def close(self) -> None:
        """Free the model; using the reranker again loads it again."""
        with self._lock:
            if self._backend is not None:
                self._backend.close()
            self._backend = None

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ready(self) -> backends.Backend:
        """The backend of this process, opened and proven if need be."""
        with self._lock:
            if self._backend is None:
                self._backend = ready(
                    self._open,
                    self._folder,
                    self.target,
                    self.manifest,
                    self._options,
                    self._custom,
                )
            return self._backend

    def scores(self, logits: Logits) -> activation.Scores:
        """Logits after the family's activation, shape [n]."""
        family = self.manifest.family
        return activation.activate(logits, family.activation, family.temperature)

    def prepare(
        self,
        pairs: list[tuple[str, str]],
        instruction: str | None = None,
        long_documents: str = "truncate",
        document_tokens: int | None = None,
    ) -> list[Item]:
        """Encode pairs for `logits`: one item each, or with `chunk` one a part.

        Args:
            pairs: queries may differ.
            instruction: as for `rank`.
            long_documents: as for `rank`.
            document_tokens: most tokens that are read of a document. None: what fits.

        Raises:
            InputError: as for `rank`.
        """
        if long_documents not in get_args(LongDocuments):
            raise InputError(
                f"long_documents is {long_documents!r}; give 'truncate', 'tail' or 'chunk'"
            )
        for i, item in enumerate(pairs):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise InputError(f"pair {i} is no (query, document) pair")
            for kind, text in zip(("query", "document"), item, strict=True):
                if not isinstance(text, str):
                    raise InputError(f"{kind} {i} is {type(text).__name__}, not a string")
        encoder = self._encoder
        queries = dict.fromkeys(query for query, _ in pairs)
        prompts = {query: encoder.prompt(query, instruction) for query in queries}
        texts = dict.fromkeys(document for _, document in pairs)
        found = encoder.documents(list(texts), instruction)
        documents = dict(zip(texts, found, strict=True))
        items = []
        for owner, (query, document) in enumerate(pairs):
            prompt, ids = prompts[query], documents[document]
            room = encoder.room(prompt, document_tokens)
            if len(ids) <= room or long_documents != "chunk":
                truncated = len(ids) > room
                if truncated and long_documents == "tail":
                    ids = encoder.end(document, prompt, room)
                pair = encoder.pair(prompt, ids[:room])
                items.append(Item(owner, prompt.prefix, *pair, truncated=truncated, part=None))
            else:
                for chunk in encoder.chunks(document, prompt, document_tokens):
                    pair = encoder.pair(prompt, chunk.ids)
                    part = (chunk.start, chunk.end)
                    items.append(Item(owner, prompt.prefix, *pair, truncated=False, part=part))
        return items

    def logits(self, items: list[Item]) -> Logits:
        """One logit an item of `prepare`, shape [n]; items of several calls may be mixed.

        Raises:
            TargetError: as for `rank`; a document is named by its place in its own call.
        """
        backend = self._ready()
        logits = np.empty(len(items), np.float32)
        for places, work in _works(items):
            found = np.asarray(backend.logits(work), np.float32)
            if found.shape != (len(work),):
                raise TargetError(
                    f"{self.target.name} gave logits of shape {found.shape} for {len(work)} inputs"
                )
            logits[places] = found
        if not np.isfinite(logits).all():
            bad = items[int(np.flatnonzero(~np.isfinite(logits))[0])].owner
            raise TargetError(
                f"{self.target.name} gave {logits[~np.isfinite(logits)][0]} for document {bad}; "
                "no ranking can be made of that. Name another variant or device"
            )
        return logits


def _works(items: list[Item]) -> list[tuple[list[int], Work]]:
    """Items as work, with their places: those of a prefix together, if there are several.

    A prefix of one item's own is no gain, and works run one after the other.
    """
    groups: dict[bytes, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.prefix.tobytes(), []).append(place)
    shared = [places for prefix, places in groups.items() if prefix and len(places) > 1]
    taken = {place for places in shared for place in places}
    single = [place for place in range(len(items)) if place not in taken]
    works = []
    if single:
        chosen = [items[place] for place in single]
        segments = [item.segments for item in chosen if item.segments is not None]
        sequences = [np.concatenate((item.prefix, item.ids)) for item in chosen]
        works.append((single, Work(sequences, segments or None)))
    for places in shared:
        chosen = [items[place] for place in places]
        works.append((places, Work([item.ids for item in chosen], prefix=chosen[0].prefix)))
    return works


_living: weakref.WeakSet[Reranker] = weakref.WeakSet()


def _forget_backends() -> None:
    """In a forked child: load again what the parent had loaded, when it is used.

    A runtime's threads do not survive a fork, and its destructor waits for them: so what was
    inherited is never freed, not even when the child exits.
    """
    for reranker in _living:
        # A thread the child does not have may hold the old one.
        reranker._lock = threading.Lock()
        if reranker._backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(reranker._backend))
            reranker._backend = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_backends)


def best_items(owners: list[int], logits: Logits) -> list[int]:
    """For each owner, in order, which of its items has the highest logit (the first of equals)."""
    best: dict[int, int] = {}
    for i, owner in enumerate(owners):
        if owner not in best or logits[i] > logits[best[owner]]:
            best[owner] = i
    return list(best.values())
