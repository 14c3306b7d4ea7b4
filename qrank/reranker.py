"""The public door: a query and documents in, a ranking out. The one place the pieces meet."""

from __future__ import annotations

import ctypes
import math
import os
import reprlib
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsIndex, get_args, overload

import numpy as np

from qrank import backends
from qrank.backends.torch import as_bundle
from qrank.bundle.locate import DEFAULT, locate, provide
from qrank.bundle.manifest import TOKENIZER, Manifest, check_files
from qrank.bundle.sequences import Logits
from qrank.errors import InputError, TargetError
from qrank.scoring import activation, arguments, calibration
from qrank.scoring.deadline import LatencyEstimate, score_within
from qrank.scoring.inputs import (
    LongDocuments,
    ModelInput,
    as_pairs,
    as_text,
    as_texts,
    best_part_of_each,
    works,
)
from qrank.scoring.memory import MemoryBudget
from qrank.scoring.pair_tokenizer import PairTokenizer, Prompt
from qrank.select.selection import (
    POLICIES,
    PROFILES,
    Choice,
    Criteria,
    Policy,
    Profile,
    choices,
    first_that_works,
)
from qrank.select.targets import Target
from qrank.select.verify import Proof, ready
from qrank.system.machine import processors


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

    def __eq__(self, other: object) -> bool:
        """Whether all is the same: two that were not scored, and have no numbers, may be equal."""
        return self._known() == other._known() if isinstance(other, Ranking) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._known())

    def __repr__(self) -> str:
        """Without what is as usual, and with a long text's ends alone."""
        numbers = (
            f"score={self.score:.6g}, logit={self.logit:.6g}" if self.scored else "scored=False"
        )
        more = ", truncated=True" if self.truncated else ""
        more += f", part={self.part}" if self.part else ""
        return f"Ranking(index={self.index}, {numbers}, text={_SHORT.repr(self.text)}{more})"

    def _known(self) -> tuple[object, ...]:
        known = (self.index, self.text, self.truncated, self.part)
        return (*known, self.score, self.logit) if self.scored else known


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


class Rankings(list[Ranking]):
    """A ranked list; so is a slice of it, or a copy. Equal to any list of the same.

    Attributes:
        scored: how many of the documents were scored: all but for a budget.
    """

    def __init__(self, ranked: Iterable[Ranking] = (), scored: int = 0) -> None:
        super().__init__(ranked)
        self.scored = scored

    @overload
    def __getitem__(self, place: SupportsIndex) -> Ranking: ...

    @overload
    def __getitem__(self, place: slice) -> Rankings: ...

    def __getitem__(self, place: SupportsIndex | slice) -> Ranking | Rankings:
        found = super().__getitem__(place)
        return found if isinstance(found, Ranking) else Rankings(found, self.scored)

    def copy(self) -> Rankings:
        """See `list`."""
        return self[:]

    def __repr__(self) -> str:
        return f"Rankings({super().__repr__()}, scored={self.scored})"


class _Users:
    """The calls that compute with a backend, and whether the last of them is to close it."""

    def __init__(self) -> None:
        self.count = 0
        self.closing = False


class Reranker:
    """Scores (query, document) pairs with a bundle. Safe to use from several threads.

    After a fork the model is loaded again in the child at its first use: a runtime's threads do
    not survive a fork. Backend openvino refuses there: make the Reranker after the fork.

    Pickled or copied, it is its arguments, and opens again where it arrives: it can be handed to
    processes, of this machine or of others that have the model.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT,
        *,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        compute_dtype: str | None = None,
        batch: int | None = None,
        max_memory: int | str | None = None,
        max_length: int | None = None,
        family: str | Path | None = None,
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
            model: a bundled name, the folder `qrank convert` wrote, or a bundle's hub id
                (`owner/name`, or `owner/name@revision`); with backend `torch` a checkpoint's
                folder or hub id.
            backend: a format (`onnx`), a variant (`openvino-int8`), `torch` (or `torch-fp16`, ...)
                to run a checkpoint as it is, or "module:function" of your own (see
                `qrank.backends`). None: the best target, by `policy`.
            device: `cpu`, or another kind that the backend knows: `qrank doctor` shows them, and
                which are here. None: as measured, or `cpu`.
            threads: CPU threads in all. None: every CPU this process may use, by its affinity and
                its container's quota.
            compute_dtype: arithmetic to compute in where the backend leaves a choice (openvino):
                `fp32`, `bf16` or `fp16`. None: the fastest that reproduces the probes here.
            batch: padded tokens a batch, for onnx and openvino. None: as measured, or their own.
            max_memory: bytes that the model's files and what is computed at once may take, by an
                estimate, or a size such as "2G": batches are cut and wait for each other
                accordingly, and a document that takes more is an error. None: half of what the
                machine, its container or the GPU has beside the model, and a document that takes
                more is computed by itself.
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
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        model = arguments.place("model", model, "a bundled name, a bundle's folder or a hub id")
        for name, value in (
            ("backend", backend),
            ("device", device),
            ("compute_dtype", compute_dtype),
        ):
            arguments.text(name, value)
        threads = arguments.whole("threads", threads, 1)
        batch = arguments.whole("batch", batch, 1)
        max_length = arguments.whole("max_length", max_length, 1)
        if family is not None:
            family = str(arguments.place("family", family, "a card's name or file, or None"))
        arguments.one_of("policy", policy, POLICIES)
        arguments.one_of("profile", profile, list(PROFILES))
        tau = "Kendall's tau, -1 to 1"
        min_kendall = arguments.number("min_kendall", min_kendall, tau, lambda x: -1 <= x <= 1)
        max_loss = arguments.number("max_loss", max_loss, "a finite number")
        self._max_memory = arguments.memory("max_memory", max_memory)
        self._calibrated = arguments.flag("calibrated", calibrated)
        criteria = Criteria(backend, device, policy, min_kendall, max_loss, profile)
        tokenizer: Path | str
        if backend is not None and backend.partition("-")[0] == "torch":
            folder, self.manifest, tokenizer = as_bundle(str(model), family)
        else:
            if family is not None:
                raise InputError("family is for checkpoints (backend torch); a bundle has its own")
            folder = locate(model, whole=False)
            self.manifest, tokenizer = Manifest.load(folder), folder / TOKENIZER
        if folder == Path(model):
            # Where a pickle of this arrives, the current folder may be another.
            self._arguments["model"] = folder.absolute()
        self._folder = folder
        check_files(folder, self.manifest.files)
        options = backends.Options(
            threads or processors(), compute_dtype, batch, family=self.manifest.family
        )
        self._encoder = PairTokenizer(
            tokenizer, self.manifest.family, max_length=max_length, threads=options.threads
        )
        self._pace = LatencyEstimate()
        self._lock = threading.RLock()
        self._backend: backends.Backend | None = None
        self._proof: Proof | None = None
        self._users = _Users()
        _living.add(self)
        first_that_works(choices(self.manifest, criteria, options), self._take)

    def __reduce__(self) -> tuple[Any, ...]:
        """What `pickle` and `copy` keep: that it is opened with the same arguments."""
        return partial(type(self), **self._arguments), ()

    def _take(self, choice: Choice) -> None:
        """Open a target, for good if it works."""
        self.choice = choice
        self._proof = None
        variant = self.target.variant
        # Of a later qrank's, nothing tells whether it computes rightly.
        backends.tolerance(variant.format, variant.precision)
        provide(self._folder, variant)
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
    def compute_dtype(self) -> str | None:
        """Arithmetic it computes in; None where the backend leaves no choice."""
        return None if self._proof is None else self._proof.compute_dtype

    @property
    def kendall(self) -> float:
        """Kendall's tau against the original on the probes, in the arithmetic it computes in."""
        proven = None if self._proof is None else self._proof.kendall
        return self.target.variant.fidelity.kendall if proven is None else proven

    @property
    def max_length(self) -> int:
        """Tokens that a pair may have, the template's included."""
        return self._encoder.limit

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Rankings:
        """Order documents by relevance, most relevant first; equal ones keep their order.

        Args:
            query: cut with a warning (logger "qrank") where it alone exceeds the limit.
            documents: any number, in an order: a list, a generator, an array, a column of a table.
                Empty and blank ones are scored like any other.
            top_k: keep only so many. None: all.
            instruction: what "relevant" means here, for families that take one (Qwen3-Reranker,
                zerank, mxbai-rerank-v2). None: the family's own, or none.
            long_documents: what becomes of a document that does not fit: `truncate` reads its
                beginning, `tail` its end, `chunk` scores overlapping parts and keeps the best.
            budget_ms: milliseconds this may take. As many of the first documents as fit are
                scored, the first always; the others follow in their order, `scored` False. How
                fast the model is is learnt from call to call, so the first few are less exact.

        Raises:
            InputError: an argument is not what it may be, a document is no string, one takes more
                memory than there is, or the family takes no instruction.
            TargetError: the backend failed, or gave a number that is not finite.
        """
        top_k = arguments.whole("top_k", top_k, 0)
        milliseconds = "milliseconds, more than 0"
        budget_ms = arguments.number("budget_ms", budget_ms, milliseconds, lambda x: x > 0)
        _check(instruction, long_documents)
        query, documents = as_text(query, "query"), as_texts(documents, "documents", "document")
        if not documents:
            return Rankings()
        pairs = [(query, document) for document in documents]
        prompts = {query: self._encoder.prompt(query, instruction)}
        items: list[ModelInput] = []
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
            scored = score_within(
                budget_ms / 1000, len(documents), self._pace, encode, score, time.perf_counter
            )
        logits = np.concatenate(found)
        best = best_part_of_each([item.owner for item in items[: len(logits)]], logits)
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
        pairs: Iterable[Sequence[str]],
        *,
        raw: Literal[False] = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> activation.Scores: ...

    @overload
    def score(
        self,
        pairs: Iterable[Sequence[str]],
        *,
        raw: Literal[True],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> Logits: ...

    def score(
        self,
        pairs: Iterable[Sequence[str]],
        *more: object,
        raw: bool = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> activation.Scores | Logits:
        """Score (query, document) pairs, in the caller's order.

        Args:
            pairs: queries may differ. A list, a generator, an array of two columns, ...
            more: nothing: what else there is has names.
            raw: logits instead of scores.
            instruction: as for `rank`.
            long_documents: as for `rank`.

        Returns:
            float64 scores, or with `raw` float32 logits; shape [n].

        Raises:
            InputError, TargetError: as for `rank`.
        """
        if more:
            raise InputError(
                "score takes one list of pairs: score([(query, document), ...]); for one query and "
                "its documents there is rank(query, documents)"
            )
        raw = arguments.flag("raw", raw)
        items = self.prepare(pairs, instruction, long_documents)
        if not items:
            return np.empty(0, np.float32) if raw else np.empty(0, np.float64)
        logits = self.logits(items)
        logits = logits[best_part_of_each([item.owner for item in items], logits)]
        return logits if raw else self.scores(logits)

    def close(self) -> None:
        """Free the model; using the reranker again loads it again.

        Calls that compute meanwhile, on other threads, end as they would: the last of them frees
        it. Whatever is dropped without this is freed, too.
        """
        with self._lock:
            backend, self._backend = self._backend, None
            users, self._users = self._users, _Users()
            users.closing = True
            unused = not users.count
        if backend is not None and unused:
            backend.close()

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
                files = self.target.variant.bytes
                self._memory = MemoryBudget.beside(
                    files, self._max_memory, self.manifest.dimensions
                )
                options = replace(self.choice.options, memory=self._memory)
                self._backend, self._proof = ready(
                    self._folder,
                    self.target,
                    self.manifest,
                    options,
                    least_kendall=self.choice.least_kendall,
                    known=self._proof,
                )
                # Only now: to be asked, a device's driver is loaded.
                own = backends.memory(self.target.backend, self.target.device)
                if own is not None:
                    self._memory.move(own, files)
            return self._backend

    @contextmanager
    def _in_use(self) -> Iterator[backends.Backend]:
        """The backend, which nobody closes meanwhile."""
        with self._lock:
            backend, users = self._ready(), self._users
            users.count += 1
        try:
            yield backend
        finally:
            with self._lock:
                users.count -= 1
                last = users.closing and not users.count
            if last:
                backend.close()

    def scores(self, logits: Logits) -> activation.Scores:
        """Logits after the family's activation, or the calibration; shape [n]."""
        if self._calibration is not None:
            return self._calibration.apply(logits)
        family = self.manifest.family
        return activation.activate(logits, family.activation, family.temperature)

    def prepare(
        self,
        pairs: Iterable[Sequence[str]],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        document_tokens: int | None = None,
    ) -> list[ModelInput]:
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
        pairs: Iterable[Sequence[str]],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        document_tokens: int | None = None,
        characters: int | None = None,
    ) -> Iterator[list[ModelInput]]:
        """As `prepare`, in steps of about so many characters of documents; None: all in one."""
        _check(instruction, long_documents)
        pairs = as_pairs(pairs)
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
    ) -> list[ModelInput]:
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
                items.append(
                    ModelInput(owner, prompt.prefix, *pair, truncated=truncated, part=None)
                )
            else:
                for chunk in encoder.chunks(document, prompt, document_tokens):
                    pair = encoder.pair(prompt, chunk.ids)
                    part = (chunk.start, chunk.end)
                    items.append(
                        ModelInput(owner, prompt.prefix, *pair, truncated=False, part=part)
                    )
        if items:
            longest = max(items, key=lambda item: item.tokens)
            self._memory.check(longest.tokens, f"document {longest.owner}")
        return items

    def logits(self, items: list[ModelInput]) -> Logits:
        """One logit an item of `prepare`, shape [n]; items of several calls may be mixed.

        Raises:
            TargetError: as for `rank`; a document is named by its place in its own call.
        """
        logits = np.empty(len(items), np.float32)
        with self._in_use() as backend:
            for places, work in works(items):
                found = np.asarray(backend.logits(work), np.float32)
                if found.shape != (len(work),):
                    raise TargetError(
                        f"{self.target.name} gave logits of shape {found.shape} for {len(work)} "
                        "inputs"
                    )
                logits[places] = found
        if not np.isfinite(logits).all():
            bad = items[int(np.flatnonzero(~np.isfinite(logits))[0])].owner
            raise TargetError(
                f"{self.target.name} gave {logits[~np.isfinite(logits)][0]} for document {bad}; "
                "no ranking can be made of that. Name another variant or device"
            )
        return logits


def _check(instruction: object, long_documents: object) -> None:
    """Refuse what is no instruction, and no way to treat long documents."""
    arguments.text("instruction", instruction)
    arguments.one_of("long_documents", long_documents, get_args(LongDocuments))


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
        reranker._lock = threading.RLock()
        reranker._pace = LatencyEstimate()
        reranker._users = _Users()
        if reranker._backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(reranker._backend))
            reranker._backend = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_backends)
