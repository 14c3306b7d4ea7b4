"""What exporting transformers' T5 and MPNet needs: buckets of distances from a table.

Both compute them in floating point, by logarithms: in fp16 or bf16, a distance may get another
bucket. The graph looks them up in a table that transformers' own function made in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def exportable(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    """Make a T5's or MPNet's buckets exact in every data type; other models are left alone.

    Args:
        model: transformers' own model.
        max_length: tokens that the graph reads.
    """
    with ExitStack() as stack:
        for prepare in (_t5, _mpnet):
            stack.enter_context(prepare(model, max_length))
        yield


@contextmanager
def _t5(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    # Its first layer has the embeddings of the buckets, for all layers.
    modules = [part for part in model.modules() if hasattr(part, "_relative_position_bucket")]
    attentions: list[Any] = [part for part in modules if part.has_relative_attention_bias]
    tables = {
        attention: attention._relative_position_bucket(
            _distances(max_length),
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        for attention in attentions
    }

    def bias_of(self: Any, queries: int, keys: int, *_: Any, **__: Any) -> Any:
        return _bias(self, tables[self], queries, keys)

    with _replaced(attentions, "compute_bias", bias_of):
        yield


@contextmanager
def _mpnet(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    encoders = [part for part in model.modules() if hasattr(part, "compute_position_bias")]
    tables = {each: each.relative_position_bucket(_distances(max_length)) for each in encoders}

    def bias_of(self: Any, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        # Not repeated for the batch, as transformers does.
        return _bias(self, tables[self], hidden.shape[1], hidden.shape[1])

    with _replaced(encoders, "compute_position_bias", bias_of):
        yield


def _distances(max_length: int) -> torch.Tensor:
    """From the last token to the first one, up to the first to the last one."""
    return torch.arange(1 - max_length, max_length)


def _bias(module: Any, table: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """The bias of each key's distance to each query, [1, heads, queries, keys]."""
    places = torch.arange(keys)[None] - torch.arange(queries)[:, None] + (len(table) // 2)
    found: torch.Tensor = module.relative_attention_bias(table[places])
    return found.permute(2, 0, 1)[None]


@contextmanager
def _replaced(modules: list[Any], name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of the modules' class, if there are any."""
    if not modules:
        yield
        return
    kind = type(modules[0])
    original = getattr(kind, name)
    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, original)
