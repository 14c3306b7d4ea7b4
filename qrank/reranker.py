"""The public door: a query and documents in, a ranking out. The one place the pieces meet."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, overload

import numpy as np

from qrank import activation, backends, calibration
from qrank.budget import Pace, spend
from qrank.bundle import TOKENIZER, Manifest, check_files
from qrank.encoding import Encoder, Prompt
from qrank.errors import InputError, TargetError
from qrank.items import Item, LongDocuments, best_items, check, works
from qrank.locate import DEFAULT, locate
from qrank.machine import processors
from qrank.memory import Memory
from qrank.proof import ready
from qrank.selection import Choice, Policy, Profile, Wish, choices, first_that_works
from qrank.targets import Target
from qrank.work import Logits


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
        scored: whether the time sufficed; if not, score and logit are NaN.
    """

    index: int
    score: float
    logit: float
    text: str
    truncated: bool = False
    part: tuple[int, int] | None = None
    scored: bool = True


class Rankings(list[Ranking]):
    """A ranked list.

    Attributes:
        scored: how many of the documents were scored: all but for a budget.
    """

    def __init__(self, ranked: Iterable[Ranking] = (), scored: int = 0) -> None:
        super().__init__(ranked)
        self.scored = scored


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
        batch: int | None = None,
        max_memory: int | None = None,
        max_length: int | None = None,
        family: str | None = None,
        policy: Policy = "fastest",
        min_kendall: float | None = None,
        max_loss: float | None = None,
        profile: Profile = "passages",
        calibrated: bool = False,
    ) -> None:
        """Load a bundle.

        With no backend named, the target is the best of those that `qrank.tune` measured on this
        machine; before that, the one expected to be the fastest on the CPU. Nothing is measured
        here. One that fails to open or to reproduce the probes is told by a warning (logger
        "qrank"), and the next is taken; what is named is taken, or an error is raised.

        Args:
            model: a bundled name, the folder `qrank convert` wrote, or a bundle's hub id; with
                backend `torch` a checkpoint's folder or hub id.
            backend: a format (`onnx`), a variant (`openvino-int8`), `torch` (or `torch-fp16`, ...)
                to run a checkpoint as it is, or "module:function" of your own (see
                `qrank.backends`). None: the best target, by `policy`.
            device: `cpu`, or what the backend offers: onnx `cuda`, `tensorrt`, `coreml`,
                `directml`; openvino `gpu`, `npu`; gguf `metal`, `cuda`, `vulkan`; torch `cuda`,
                `mps`. None: as measured, or `cpu`.
            threads: CPU threads in all. None: every CPU this process may use.
            execution: arithmetic to compute in where the backend leaves a choice (openvino):
                `fp32`, `bf16` or `fp16`. None: the fastest that reproduces the probes here.
            batch: padded tokens a batch, for onnx and openvino. None: as measured, or their own.
            max_memory: bytes that the model's files and what is computed at once may take, by an
                estimate: batches are cut and wait for each other accordingly, and a document that
                takes more is an error. None: half of what the machine has beside the model, and a
                document that takes more is computed by itself.
            max_length: tokens a pair may have. None: what the model reads.
            family: with backend `torch`: the card that reads the checkpoint, by name or file, where
                nothing in it tells. A bundle knows its own.
            policy: `fastest`, `smallest` or `most-faithful`.
            min_kendall: least Kendall's tau against the original, by the bundle's manifest.
            max_loss: most nDCG@10 that `qrank eval` may have found a variant to lose against fp32,
                on your data; what it has not measured is not taken.
            profile: what the work is like, if it was measured: `short` (single short pairs),
                `passages` (20 documents of 128 tokens) or `long` (100 of 512).
            calibrated: scores are the probabilities that `qrank calibrate` fitted for the variant,
                on this machine. Order and logits stay what they are.

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
        if max_memory is not None and max_memory < 1:
            raise InputError(f"max_memory is {max_memory}; it must be 1 byte or more")
        self._folder = folder
        self._max_memory = max_memory
        self._calibrated = calibrated
        check_files(folder, self.manifest.files)
        options = backends.Options(
            threads or processors(), execution, batch, family=self.manifest.family
        )
        self._encoder = Encoder(
            tokenizer, self.manifest.family, max_length=max_length, threads=options.threads
        )
        self._pace = Pace()
        self._lock = threading.Lock()
        self._backend: backends.Backend | None = None
        _living.add(self)
        wish = Wish(backend, device, policy, min_kendall, max_loss, profile)
        first_that_works(choices(self.manifest, wish, options), self._take)

    def _take(self, choice: Choice) -> None:
        """Open a target, for good if it works."""
        self.choice = choice
        variant = self.target.variant
        check_files(self._folder, variant.files)
        self._calibration = calibration.load(self.manifest, variant) if self._calibrated else None
        self._ready()

    @property
    def target(self) -> Target:
        """The variant that runs, and the device."""
        return self.choice.target

    @property
    def format(self) -> str:
        """The format that runs, which names its backend."""
        return self.target.variant.format

    @property
    def threads(self) -> int:
        """CPU threads it may use."""
        return self.choice.options.threads

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
        budget_ms: float | None = None,
    ) -> Rankings:
        """Order documents by relevance, most relevant first; equal ones keep their order.

        Args:
            query: cut with a warning (logger "qrank") where it alone exceeds the limit.
            documents: any number; empty and blank ones are scored like any other.
            top_k: keep only so many. None: all.
            instruction: what "relevant" means here, for families that take one (Qwen3-Reranker,
                zerank, mxbai-rerank-v2). None: the family's own, or none.
            long_documents: what becomes of a document that does not fit: `truncate` reads its
                beginning, `tail` its end, `chunk` scores overlapping parts and keeps the best.
            budget_ms: milliseconds this may take. As many of the first documents as fit are
                scored, the first always; the others follow in their order, `scored` False. How
                fast the model is is learnt from call to call, so the first few are less exact.

        Raises:
            InputError: an argument is out of its range, a document is no string, one takes more
                memory than there is, or the family takes no instruction.
            TargetError: the backend failed, or gave a number that is not finite.
        """
        if top_k is not None and top_k < 0:
            raise InputError(f"top_k is {top_k}; it must be 0 or more")
        if isinstance(documents, str):
            raise InputError("documents is one string; give a list of strings")
        if budget_ms is not None and not 0 < budget_ms < math.inf:
            raise InputError(f"budget_ms is {budget_ms}; it must be more than 0, and finite")
        documents = list(documents)
        pairs = [(query, document) for document in documents]
        check(pairs, long_documents)
        if not documents:
            return Rankings()
        prompts = {query: self._encoder.prompt(query, instruction)}
        items: list[Item] = []
        found: list[Logits] = []

        def encode(start: int, end: int) -> list[int]:
            """Make items of some documents, and return how many tokens each has."""
            tokens = [0] * (end - start)
            some = pairs[start:end]
            new = self._items(some, prompts, instruction, long_documents, first=start)
            for item in new:
                tokens[item.owner - start] += item.tokens
            items.extend(new)
            return tokens

        def score(start: int, end: int) -> None:
            known = sum(map(len, found))
            found.append(self.logits([i for i in items[known:] if i.owner < end]))

        if budget_ms is None:
            encode(0, len(documents))
            score(0, scored := len(documents))
        else:
            scored = spend(
                budget_ms / 1000, len(documents), self._pace, encode, score, time.perf_counter
            )
        logits = np.concatenate(found)
        best = best_items([item.owner for item in items[: len(logits)]], logits)
        scores = self.scores(logits)
        # Stable, and on logits: scores may tie where an activation saturates.
        order = sorted(best, key=lambda i: -logits[i])
        ranked = [
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
        for index in range(scored, len(documents)):
            ranked.append(Ranking(index, math.nan, math.nan, documents[index], scored=False))
        return Rankings(ranked[:top_k], scored)

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
                self._memory = Memory.beside(
                    self.target.variant.bytes, self._max_memory, self.manifest.dimensions
                )
                options = replace(self.choice.options, memory=self._memory)
                self._backend = ready(self._folder, self.target, self.manifest, options)
            return self._backend

    def scores(self, logits: Logits) -> activation.Scores:
        """Logits after the family's activation, or the calibration; shape [n]."""
        if self._calibration is not None:
            return self._calibration.apply(logits)
        family = self.manifest.family
        return activation.activate(logits, family.activation, family.temperature)

    def prepare(
        self,
        pairs: list[tuple[str, str]],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
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
        steps = self.preparing(pairs, instruction, long_documents, document_tokens)
        return [item for step in steps for item in step]

    def preparing(
        self,
        pairs: list[tuple[str, str]],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        document_tokens: int | None = None,
        characters: int | None = None,
    ) -> Iterator[list[Item]]:
        """As `prepare`, in steps of about so many characters of documents; None: all in one."""
        check(pairs, long_documents)
        prompts: dict[str, Prompt] = {}
        start = 0
        for end in _steps([len(document) for _, document in pairs], characters):
            some = pairs[start:end]
            prompts = {
                query: prompts.get(query) or self._encoder.prompt(query, instruction)
                for query in dict.fromkeys(query for query, _ in some)
            }
            yield self._items(some, prompts, instruction, long_documents, document_tokens, start)
            start = end

    def _items(
        self,
        pairs: list[tuple[str, str]],
        prompts: dict[str, Prompt],
        instruction: str | None,
        long_documents: LongDocuments,
        document_tokens: int | None = None,
        first: int = 0,
    ) -> list[Item]:
        """Model inputs of pairs; `owner` is a pair's place, counted from `first`."""
        encoder = self._encoder
        texts = dict.fromkeys(document for _, document in pairs)
        most = max((encoder.room(p, document_tokens) for p in prompts.values()), default=0)
        found = encoder.documents(list(texts), instruction, most)
        documents = dict(zip(texts, found, strict=True))
        items = []
        for owner, (query, document) in enumerate(pairs, first):
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
        if items:
            longest = max(items, key=lambda item: item.tokens)
            self._memory.check(longest.tokens, f"document {longest.owner}")
        return items

    def logits(self, items: list[Item]) -> Logits:
        """One logit an item of `prepare`, shape [n]; items of several calls may be mixed.

        Raises:
            TargetError: as for `rank`; a document is named by its place in its own call.
        """
        backend = self._ready()
        logits = np.empty(len(items), np.float32)
        for places, work in works(items):
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


def _steps(sizes: list[int], most: int | None) -> Iterator[int]:
    """Where to stop on the way through things of these sizes: each time at `most` or beyond."""
    passed = 0
    for place, size in enumerate(sizes, 1):
        passed += size
        if place == len(sizes) or (most is not None and passed >= most):
            yield place
            passed = 0


_living: weakref.WeakSet[Reranker] = weakref.WeakSet()


def _forget_backends() -> None:
    """In a forked child: load again what the parent had loaded, when it is used.

    A runtime's threads do not survive a fork, and its destructor waits for them: so what was
    inherited is never freed, not even when the child exits.
    """
    for reranker in _living:
        # A thread the child does not have may hold the old ones.
        reranker._lock = threading.Lock()
        reranker._pace = Pace()
        if reranker._backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(reranker._backend))
            reranker._backend = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_backends)
