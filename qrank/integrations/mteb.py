"""MTEB: a model for its reranking tasks.

import mteb
from qrank.integrations.mteb import QrankCrossEncoder

mteb.evaluate(QrankCrossEncoder("mini"), mteb.get_task("AskUbuntuDupQuestions"))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from mteb.models.model_meta import ModelMeta
from numpy.typing import NDArray

from qrank.reranker import Reranker

FRAMEWORKS = {"gguf": "GGUF", "onnx": "ONNX", "openvino": "OpenVINO", "torch": "PyTorch"}
"""MTEB's names of the formats."""


class QrankCrossEncoder:
    """Scores pairs of texts, by MTEB's `CrossEncoderProtocol`.

    Attributes:
        reranker: the opened `Reranker`.
    """

    def __init__(
        self,
        model_name: str = "mini",
        revision: str | None = None,
        device: str | None = None,
        *,
        instruction: str | None = None,
        long_documents: Literal["truncate", "tail", "chunk"] = "truncate",
        **options: Any,
    ) -> None:
        """Open a model.

        Args:
            model_name: as `model` of `qrank.Reranker`.
            revision: as for `Reranker`.
            device: as for `Reranker`.
            instruction: as for `Reranker.score`, for queries without an instruction of their own.
            long_documents: as for `Reranker.score`.
            options: other arguments of `Reranker`: `backend`, `threads`, ...

        Raises:
            QrankError: as for `Reranker`.
        """
        self.reranker = Reranker(model_name, revision=revision, device=device, **options)
        self.instruction = instruction
        self.long_documents = long_documents

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """How MTEB names the model, and keeps the results of its variants apart."""
        engine = self.reranker.engine
        manifest, target = engine.manifest, engine.target
        source, format = manifest.source, target.variant.format
        return ModelMeta.create_empty(
            overwrites={
                "loader": type(self),
                # Only what comes from the hub has a revision.
                "name": source.id if source.revision else f"qrank/{manifest.name}",
                "revision": source.revision or source.fingerprint[:12],
                "max_tokens": engine.max_length,
                "memory_usage_mb": target.variant.bytes / 2**20,
                "framework": [FRAMEWORKS[format]] if format in FRAMEWORKS else [],
                "use_instructions": manifest.family.takes_instruction,
                "model_type": ["cross-encoder"],
                "experiment_kwargs": {"qrank": target.name},
            }
        )

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Sequence[Any]]],
        inputs2: Iterable[Mapping[str, Sequence[Any]]],
        *,
        task_metadata: object,
        hf_split: str,
        hf_subset: str,
        prompt_type: object = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Logits of pairs: MTEB orders by them, and they differ where scores tie at 1.0.

        Queries with an instruction of their own (tasks of type InstructionReranking) are scored
        with it if the model takes one; otherwise it follows the query, as MTEB writes it.

        Args:
            inputs1: batches of queries.
            inputs2: batches of documents, one for each query.
            task_metadata: of no effect, as are all arguments after it.
            hf_split: see `task_metadata`.
            hf_subset: see `task_metadata`.
            prompt_type: see `task_metadata`.
            kwargs: see `task_metadata`; qrank cuts batches by what its target pays.

        Returns:
            float32 logits, in the pairs' order; shape [n].

        Raises:
            InputError, TargetError: as for `Reranker.score`.
        """
        documents = [text for batch in inputs2 for text in batch["text"]]
        queries = [each for batch in inputs1 for each in self._queries(batch)]
        places = defaultdict(list)
        for place, (_, instruction) in enumerate(queries):
            places[instruction].append(place)
        pairs = [(text, document) for (text, _), document in zip(queries, documents, strict=True)]
        logits = np.empty(len(pairs), np.float32)
        for instruction, some in places.items():
            logits[some] = self.reranker.score(
                [pairs[place] for place in some],
                raw=True,
                instruction=instruction,
                long_documents=self.long_documents,
            )
        return logits

    def _queries(self, batch: Mapping[str, Sequence[Any]]) -> list[tuple[str, str | None]]:
        """The queries of a batch, each with its instruction."""
        if "instruction" in batch and self.reranker.engine.manifest.family.takes_instruction:
            own = [each or self.instruction for each in batch["instruction"]]
            return list(zip(batch["query"], own, strict=True))
        return [(text, self.instruction) for text in batch["text"]]
