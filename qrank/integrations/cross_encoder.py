"""A class in the shape of sentence-transformers' CrossEncoder: change the import, keep the rest.

    from qrank.integrations.cross_encoder import CrossEncoder

Made after version 6.2. What takes a CrossEncoder and does not ask for its class takes this one:
`mine_hard_negatives`, the reranking evaluators, LanceDB, agno, mem0, and own code. Torch is
imported only where its tensors are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrank.errors import InputError
from qrank.reranker import Reranker
from qrank.system.extras import need


class CrossEncoder:
    """Scores pairs with a bundle, by sentence-transformers' methods and arguments.

    Attributes:
        reranker: the opened `Reranker`.
        activation_fn: applied to the logits as a tensor; None: the model's own activation.
        model_card_data: keeps what evaluators report, as `metrics`.
    """

    def __init__(
        self,
        model_name_or_path: str | Path = "mini",
        *,
        max_length: int | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        device: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        """Open a model.

        Args:
            model_name_or_path: as for `Reranker`: a bundled name, a bundle's folder or a hub id.
            max_length: maximum tokens of a pair. None: the model's limit.
            activation_fn: as `torch.nn.Sigmoid()`. None: the model's own.
            device: as for `Reranker`.
            revision: as for `Reranker`.
            options: other arguments of `Reranker`: `backend`, `threads`, ...

        Raises:
            QrankError: as for `Reranker`.
        """
        self.reranker = Reranker(
            model_name_or_path, max_length=max_length, device=device, revision=revision, **options
        )
        self.activation_fn = activation_fn
        self.model_card_data = SimpleNamespace(metrics={}, set_evaluation_metrics=self._reported)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a pair."""
        return self.reranker.engine.max_length

    @property
    def num_labels(self) -> int:
        """The number of scores per pair: 1."""
        return 1

    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        pool: object = None,
        chunk_size: int | None = None,
    ) -> Any:
        """Score (query, document) pairs.

        Args:
            inputs: pairs, or a single one: its score is returned alone.
            prompt_name: must be None: a model's default instruction is in its bundle.
            prompt: an instruction, for models that take one.
            batch_size: of no effect, as are `show_progress_bar`, `device`, `pool` and
                `chunk_size`: qrank cuts batches by what its target pays, uses all threads it may
                in one process, and stays on the device it was opened on.
            show_progress_bar: see `batch_size`.
            activation_fn: instead of the object's own.
            apply_softmax: of no effect with one score per pair, as there.
            convert_to_numpy: return a float32 array; otherwise a list of tensors.
            convert_to_tensor: return a tensor, whatever `convert_to_numpy` says.
            device: see `batch_size`.
            pool: see `batch_size`.
            chunk_size: see `batch_size`.

        Returns:
            Scores of shape [n], in the pairs' order.

        Raises:
            InputError, TargetError: as for `Reranker.score`; or `prompt_name` is not None.
        """
        if prompt_name is not None:
            raise InputError(f"prompt_name is {prompt_name!r}; give the text itself, as prompt")
        single = _is_pair(inputs)
        pairs: Iterable[Sequence[str]] = [inputs] if single else inputs
        found = self._scores(pairs, prompt, activation_fn or self.activation_fn)
        if convert_to_tensor or not convert_to_numpy:
            torch = need("torch", extra="torch")
            tensor = torch.from_numpy(found)
            if single:
                return tensor[0]
            return tensor if convert_to_tensor else list(tensor)
        return found[0] if single else found

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        pool: object = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Order documents by relevance, the most relevant first; ties keep their order.

        Args:
            query: the query.
            documents: what to order.
            top_k: maximum number of results. None: all.
            return_documents: also return each text, as `text`.
            prompt_name: as for `predict`.
            prompt: as for `predict`.
            batch_size: of no effect, as for `predict`.
            show_progress_bar: of no effect.
            activation_fn: as for `predict`.
            apply_softmax: of no effect.
            convert_to_numpy: of no effect: scores are Python floats.
            convert_to_tensor: of no effect.
            device: of no effect.
            pool: of no effect.
            chunk_size: of no effect.

        Returns:
            One dictionary per result: `corpus_id`, the document's position in `documents`, and
            `score`.

        Raises:
            InputError, TargetError: as for `predict`.
        """
        texts = list(documents)
        if prompt_name is None and (activation_fn or self.activation_fn) is None:
            # By logits, which still differ where two scores are 1.0.
            ranked = self.reranker.rank(query, texts, top_k=top_k, instruction=prompt)
            found = [(each.index, each.score) for each in ranked]
        else:
            scores = self.predict(
                [(query, text) for text in texts],
                prompt_name=prompt_name,
                prompt=prompt,
                activation_fn=activation_fn,
            )
            order = np.argsort(-scores, kind="stable")[:top_k].tolist()
            found = [(i, float(scores[i])) for i in order]
        more = [{"text": texts[i]} if return_documents else {} for i, _ in found]
        return [
            {"corpus_id": i, "score": score, **text}
            for (i, score), text in zip(found, more, strict=True)
        ]

    def start_multi_process_pool(self, target_devices: object = None) -> dict[str, Any]:
        """A pool that `predict` takes and does not need: its one process uses all threads."""
        return {"input": None, "output": None, "processes": []}

    def stop_multi_process_pool(self, pool: object) -> None:
        """The end of such a pool."""

    def _scores(
        self,
        pairs: Iterable[Sequence[str]],
        prompt: str | None,
        activation: Callable[[Any], Any] | None,
    ) -> NDArray[np.float32]:
        if activation is None:
            return self.reranker.score(pairs, instruction=prompt).astype(np.float32)
        logits = self.reranker.score(pairs, instruction=prompt, raw=True)
        found = activation(need("torch", extra="torch").from_numpy(logits))
        return np.asarray(found.float().numpy(), np.float32)

    def _reported(self, evaluator: object, metrics: dict[str, Any], *_: object) -> None:
        self.model_card_data.metrics.update(metrics)


def _is_pair(inputs: Any) -> bool:
    """Whether it is a single pair of texts: sentence-transformers' rule."""
    return (
        isinstance(inputs, list | tuple | np.ndarray)
        and len(inputs) == 2
        and isinstance(inputs[0], str)
    )
