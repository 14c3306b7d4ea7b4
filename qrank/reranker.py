"""The public entry point: a query and documents in, a ranking out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from qrank import backends
from qrank.backends.forks import waited_for
from qrank.backends.torch import as_bundle
from qrank.bundle.locate import DEFAULT
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.engine import Engine
from qrank.errors import InputError
from qrank.scoring import activation, arguments
from qrank.scoring.asked import Asked, check_reading
from qrank.scoring.inputs import LongDocuments, ModelInput, as_pairs
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.scoring.ranker import Ranker
from qrank.scoring.ranking import Ranking, Rankings, ScoredPairs
from qrank.select.measurements import PROFILES, Profile
from qrank.select.obtain import Wanted, obtain
from qrank.select.selection import (
    POLICIES,
    Choice,
    Criteria,
    Policy,
    choices,
    first_that_works,
)
from qrank.select.targets import Target

__all__ = ["Ranking", "Rankings", "Reranker"]

SCORED_AT_ONCE = 4096
"""Pairs whose token ids `score` holds at once, sorted by length: memory stays flat, whatever the
number of pairs."""


class Reranker(Ranker):
    """Scores (query, document) pairs with a bundle. Thread-safe.

    After a fork, the child loads the model again on first use, because a runtime's threads do not
    survive a fork. OpenVINO cannot run there: the child takes the next target, with a warning, or
    raises an error if the backend was named. Create the Reranker after the fork.

    Pickling or copying keeps only its arguments, and unpickling opens the model again. So it can be
    passed to other processes, on this machine or on others that have the model.
    """

    def __init__(
        self,
        model: str | Path | Bundle = DEFAULT,
        *,
        revision: str | None = None,
        convert: bool = True,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        compute_dtype: str | None = None,
        max_batch_tokens: int | None = None,
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

        If no backend is named, the target is the best of those that `qrank.tune` measured on this
        machine; without measurements, the one expected to be fastest on the CPU. If a target fails
        to open or to reproduce the probes, a warning says so (logger "qrank") and the next one is
        tried. If a backend is named, its target is used, or an error is raised.

        Args:
            model: a bundled name, the folder `qrank convert` wrote, or a hub id (`owner/name`, or
                `owner/name@revision`) of a bundle or a checkpoint; with backend `torch`, also a
                checkpoint's folder. Or a `Bundle` from `qrank.bundle.locate`, found already.
            revision: branch, tag or commit on the hub. None: what `model` says, or `main`.
            convert: convert a hub's checkpoint on first use (`qrank.select.obtain`), or refuse it.
            backend: a format (`onnx`), a variant (`openvino-int8`), `torch` (or `torch-fp16`, ...)
                to run a checkpoint without converting it, or your own "module:function" (see
                `qrank.backends`). None: the best target, by `policy`.
            device: `cpu`, or another kind that the backend knows, with a number from the second on
                (`cuda:1`): `qrank doctor` lists them, and which are present. None: as measured, or
                `cpu`.
            threads: CPU threads in total. None: every CPU this process may use, by its affinity and
                its container's quota.
            compute_dtype: data type to compute in, if the backend has a choice (openvino): `fp32`,
                `bf16` or `fp16`. None: the fastest that reproduces the probes here.
            max_batch_tokens: maximum padded tokens per batch, for onnx and openvino. None: as
                measured, or the backend's default.
            max_memory: bytes, or a size such as "2G", that the model's files and all running
                batches may take, by an estimate. Batches are split, and wait for each other, to
                stay within it; a document that needs more is an error. None: half of what the
                machine, its container or the GPU has besides the model; a document that needs more
                is computed while no other batch runs.
            max_length: maximum tokens in a pair. None: the model's limit.
            family: card of a checkpoint that does not identify itself, by name or file.
            policy: `fastest`, `smallest` or `most-faithful`.
            min_kendall: least Kendall's tau against the original, on the bundle's probes.
            max_loss: largest nDCG@10 loss against fp32 that `qrank eval` may have measured on your
                data; variants that it has not measured are not taken.
            profile: what the work is like, if it was measured: `short` (single short pairs),
                `passages` (20 documents of 128 tokens) or `long` (100 of 512).
            calibrated: return the probabilities that `qrank calibrate` fitted for the variant on
                this machine as scores. Order and logits do not change.

        Raises:
            QrankError: see `qrank.errors`; the message says what to do.
        """
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        model = arguments.model(model)
        revision = arguments.text("revision", revision)
        convert = arguments.flag("convert", convert)
        arguments.text("backend", backend)
        device = arguments.device(device)
        arguments.text("compute_dtype", compute_dtype)
        threads = arguments.threads(threads)
        max_batch_tokens = arguments.whole("max_batch_tokens", max_batch_tokens, 1)
        max_length = arguments.whole("max_length", max_length, 1)
        if family is not None:
            family = str(arguments.place("family", family, "a card's name or file, or None"))
        arguments.one_of("policy", policy, POLICIES)
        arguments.one_of("profile", profile, list(PROFILES))
        tau = "Kendall's tau, -1 to 1"
        min_kendall = arguments.number("min_kendall", min_kendall, tau, lambda x: -1 <= x <= 1)
        max_loss = arguments.number("max_loss", max_loss, "a finite number")
        max_bytes = arguments.memory("max_memory", max_memory)
        calibrated = arguments.flag("calibrated", calibrated)
        criteria = Criteria(backend, device, policy, min_kendall, max_loss, profile)
        tokenizer_json: Path | str
        if backend is not None and backend.partition("-")[0] == "torch":
            where = model.folder if isinstance(model, Bundle) else model
            bundle, tokenizer_json = as_bundle(str(where), family, revision)
        else:
            wanted = Wanted(() if backend is None else (backend,), device, family)
            bundle = obtain(model, wanted, revision=revision, convert=convert, whole=False)
            tokenizer_json = bundle.tokenizer
        if isinstance(model, Bundle) or bundle.folder == Path(model):
            # A pickle may be loaded in a different current folder.
            self._arguments["model"] = bundle.folder.absolute()
        manifest = bundle.manifest
        bundle.check(manifest.files)
        options = backends.Options(threads, compute_dtype, max_batch_tokens, family=manifest.family)
        tokenizer = PairTokenizer(
            tokenizer_json, manifest.family, max_length=max_length, threads=options.threads
        )
        self._open = partial(Engine, bundle, tokenizer, max_memory=max_bytes, calibrated=calibrated)
        self._choices = choices(manifest, criteria, options)
        self._engine = first_that_works(self._choices, self._open)
        self._process = os.getpid()
        self._lock = waited_for(threading.RLock())

    @property
    def engine(self) -> Engine:
        """The opened target; in a forked child, the first from it on that works there.

        Raises:
            QrankError: in a forked child, none works.
        """
        if self._process != os.getpid():
            with self._lock:
                if self._process != os.getpid():
                    rest = self._choices[self._choices.index(self._engine.choice) :]
                    self._engine = first_that_works(rest, self._opened_again)
                    self._process = os.getpid()
        return self._engine

    def _opened_again(self, choice: Choice) -> Engine:
        if choice != self._engine.choice:
            return self._open(choice)
        self._engine.open()
        return self._engine

    @property
    def choice(self) -> Choice:
        """The target that runs, and how it was chosen."""
        return self.engine.choice

    @property
    def target(self) -> Target:
        """The variant that runs, and the device."""
        return self.engine.target

    def rank(
        self,
        query: str,
        documents: Iterable[str | Mapping[str, Any]],
        *,
        text_key: str = "text",
        top_k: int | None = None,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
        budget_ms: float | None = None,
    ) -> Rankings:
        """Order documents by relevance, most relevant first; ties keep their order.

        Args:
            query: truncated with a warning (logger "qrank") if it exceeds the limit on its own.
            documents: any ordered collection: a list, a generator, an array, a column of a table.
                Empty and blank documents are scored like any other. A document may be a dictionary
                with its text in one field; a result's `index` tells which it was.
            text_key: the name of that field.
            top_k: maximum number of results. None: all.
            instruction: what "relevant" means here, for families that take an instruction
                (Qwen3-Reranker, zerank, mxbai-rerank-v2). None: the family's default, if any.
            long_documents: what to do with a document that does not fit: `truncate` reads its
                beginning, `tail` its end, `chunk` scores overlapping parts and keeps the best.
            budget_ms: milliseconds this may take. Documents are scored in order while time is left,
                always at least the first; the others follow in their order, with `scored` False.
                The model's speed is learnt from call to call, so the first few are less exact.

        Raises:
            InputError: an argument is invalid, a document has no text or needs more memory than
                there is, or the family takes no instruction.
            TargetError: the backend failed, or returned a logit that is not finite.
        """
        asked = Asked.of(query, documents, text_key, top_k, instruction, long_documents, budget_ms)
        if not asked.texts:
            return Rankings()
        pairs = [(asked.query, text) for text in asked.texts]
        how = (None, asked.instruction, asked.long_documents)
        engine = self.engine
        inputs: list[ModelInput] = []
        logits: list[Logits] = []
        for some, found in engine.scoring(pairs, *how, seconds=asked.seconds):
            inputs += some
            logits.append(found)
        scored = ScoredPairs.of(inputs, np.concatenate(logits), engine.scores)
        return Rankings.of(scored, asked.texts)[: asked.top_k]

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
            more: must be empty: all other arguments are keyword-only.
            raw: return logits instead of scores.
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
        check_reading(instruction, long_documents)
        engine, texts = self.engine, as_pairs(pairs)
        stops = range(SCORED_AT_ONCE, len(texts) + SCORED_AT_ONCE, SCORED_AT_ONCE)
        found = []
        for inputs in engine.preparing(texts, stops, instruction, long_documents):
            part = ScoredPairs.of(inputs, engine.logits(inputs), engine.scores)
            # Not the whole part, which holds its token ids.
            found.append(part.logits if raw else part.scores)
        return np.concatenate([np.empty(0, np.float32 if raw else np.float64), *found])

    @overload
    async def ascore(
        self,
        pairs: Iterable[Sequence[str]],
        *,
        raw: Literal[False] = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> activation.Scores: ...

    @overload
    async def ascore(
        self,
        pairs: Iterable[Sequence[str]],
        *,
        raw: Literal[True],
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> Logits: ...

    async def ascore(
        self,
        pairs: Iterable[Sequence[str]],
        *,
        raw: bool = False,
        instruction: str | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> activation.Scores | Logits:
        """As `score`, in a thread of asyncio's pool, like `arank`."""
        from asyncio import to_thread

        return await to_thread(
            self.score,  # type: ignore[arg-type]  # mypy takes one of its overloads
            pairs,
            raw=raw,
            instruction=instruction,
            long_documents=long_documents,
        )

    def close(self) -> None:
        """Free the model; the next use loads it again.

        Calls running on other threads finish normally; the last of them frees the model. A reranker
        that is garbage-collected without `close` frees it too.
        """
        self._engine.close()
