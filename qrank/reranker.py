"""The public door: a query and documents in, a ranking out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args, overload

import numpy as np

from qrank import backends
from qrank.backends.torch import as_bundle
from qrank.bundle.locate import DEFAULT, locate
from qrank.bundle.opened import Bundle
from qrank.bundle.sequences import Logits
from qrank.engine import Engine
from qrank.errors import InputError
from qrank.scoring import activation, arguments
from qrank.scoring.deadline import doubling, score_within
from qrank.scoring.inputs import LongDocuments, as_pairs, as_text, as_texts
from qrank.scoring.pair_tokenizer import PairTokenizer
from qrank.scoring.ranking import Ranking, Rankings, ScoredPairs
from qrank.select.measurements import PROFILES, Profile
from qrank.select.selection import (
    POLICIES,
    Choice,
    Criteria,
    Policy,
    choices,
    first_that_works,
)
from qrank.select.targets import Target
from qrank.system.machine import processors

__all__ = ["Ranking", "Rankings", "Reranker"]


class Reranker:
    """Scores (query, document) pairs with a bundle. Safe to use from several threads.

    After a fork the model is loaded again in the child at its first use: a runtime's threads do
    not survive a fork. Backend openvino refuses there: make the Reranker after the fork.

    Pickled or copied, it is its arguments, and opens again where it arrives: it can be handed to
    processes, of this machine or of others that have the model.

    Attributes:
        engine: the target that runs, opened.
    """

    def __init__(
        self,
        model: str | Path | Bundle = DEFAULT,
        *,
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

        With no backend named, the target is the best of those that `qrank.tune` measured on this
        machine; before that, the one expected to be the fastest on the CPU. Nothing is measured
        here. One that fails to open or to reproduce the probes is told by a warning (logger
        "qrank"), and the next is taken; what is named is taken, or an error is raised.

        Args:
            model: a bundled name, the folder `qrank convert` wrote, or a bundle's hub id
                (`owner/name`, or `owner/name@revision`); with backend `torch` a checkpoint's
                folder or hub id. Or what `qrank.bundle.locate` made of it: then nothing is looked
                for again.
            backend: a format (`onnx`), a variant (`openvino-int8`), `torch` (or `torch-fp16`, ...)
                to run a checkpoint as it is, or "module:function" of your own (see
                `qrank.backends`). None: the best target, by `policy`.
            device: `cpu`, or another kind that the backend knows: `qrank doctor` shows them, and
                which are here. None: as measured, or `cpu`.
            threads: CPU threads in all. None: every CPU this process may use, by its affinity and
                its container's quota.
            compute_dtype: arithmetic to compute in where the backend leaves a choice (openvino):
                `fp32`, `bf16` or `fp16`. None: the fastest that reproduces the probes here.
            max_batch_tokens: padded tokens a batch, for onnx and openvino. None: as measured, or
                their own.
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
        model = arguments.model(model)
        arguments.text("backend", backend)
        arguments.text("device", device)
        arguments.text("compute_dtype", compute_dtype)
        threads = arguments.whole("threads", threads, 1)
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
            bundle, tokenizer_json = as_bundle(str(where), family)
        else:
            if family is not None:
                raise InputError("family is for checkpoints (backend torch); a bundle has its own")
            bundle = locate(model, whole=False)
            tokenizer_json = bundle.tokenizer
        if isinstance(model, Bundle) or bundle.folder == Path(model):
            # Where a pickle of this arrives, the current folder may be another.
            self._arguments["model"] = bundle.folder.absolute()
        manifest = bundle.manifest
        bundle.check(manifest.files)
        options = backends.Options(
            threads or processors(), compute_dtype, max_batch_tokens, family=manifest.family
        )
        tokenizer = PairTokenizer(
            tokenizer_json, manifest.family, max_length=max_length, threads=options.threads
        )
        opened = partial(Engine, bundle, tokenizer, max_memory=max_bytes, calibrated=calibrated)
        self.engine = first_that_works(choices(manifest, criteria, options), opened)

    def __reduce__(self) -> tuple[Any, ...]:
        """What `pickle` and `copy` keep: that it is opened with the same arguments."""
        return partial(type(self), **self._arguments), ()

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
        engine, asked = self.engine, (instruction, long_documents)
        if budget_ms is None:
            inputs = engine.prepare(pairs, *asked)
            logits = engine.logits(inputs)
        else:
            steps = engine.preparing(pairs, doubling(len(pairs)), *asked)
            inputs, found = [], []
            for some in score_within(budget_ms / 1000, steps, engine.latency):
                inputs += some
                found.append(engine.logits(some))
            logits = np.concatenate(found)
        return Rankings.of(ScoredPairs.of(inputs, logits, engine.scores), documents)[:top_k]

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
        _check(instruction, long_documents)
        inputs = self.engine.prepare(as_pairs(pairs), instruction, long_documents)
        if not inputs:
            return np.empty(0, np.float32) if raw else np.empty(0, np.float64)
        scored = ScoredPairs.of(inputs, self.engine.logits(inputs), self.engine.scores)
        return scored.logits if raw else scored.scores

    def close(self) -> None:
        """Free the model; using the reranker again loads it again.

        Calls that compute meanwhile, on other threads, end as they would: the last of them frees
        it. Whatever is dropped without this is freed, too.
        """
        self.engine.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check(instruction: object, long_documents: object) -> None:
    """Refuse what is no instruction, and no way to treat long documents."""
    arguments.text("instruction", instruction)
    arguments.one_of("long_documents", long_documents, get_args(LongDocuments))
