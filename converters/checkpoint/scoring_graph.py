"""The torch modules that are exported: token ids in, one logit per sequence out.

Only converters and the torch backend import this module, because it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

import torch

from qrank.bundle.family import Family, label_row
from qrank.converters.checkpoint.reference import start_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Scorer = Union["EncoderScorer", "EncoderDecoderScorer", "DecoderScorer"]


def scorer(model: PreTrainedModel, family: Family) -> Scorer:
    """The scoring graph of transformers' own model."""
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            # Both rescale positions above a length that exceeds the family's limit.
            module.rope_type = "default"
    if family.pooling == "step":
        return EncoderDecoderScorer(model, head_row(model, family))
    if not family.decoder:
        return EncoderScorer(model, family.classes)
    return DecoderScorer(model, head_row(model, family), family.max_length)


def input_names(family: Family) -> list[str]:
    """The inputs of a family's scoring graph, in order."""
    if family.decoder:
        return ["input_ids", "last", "prefix", "keep"]
    types = [] if family.segments is None else ["token_type_ids"]
    return ["input_ids", "attention_mask", *types]


def head_row(model: PreTrainedModel, family: Family) -> torch.Tensor:
    """A language model's score head, fp32 of shape [hidden]; no other token's logits are needed."""
    if not family.labels:
        rows = model.score.weight.float()
    else:
        rows = model.get_output_embeddings().weight[list(family.labels)].float()
    row: torch.Tensor = label_row(rows)
    return row


def _apply(head: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Logits, float32 [batch, 1], of final hidden states [batch, hidden] by a head's row.

    Not a matrix product, so that quantization of matrix products leaves the row alone.
    """
    return (final.float() * head).sum(1, keepdim=True)


class EncoderScorer(torch.nn.Module):
    """A cross-encoder, as transformers computes it.

    Inputs, int64 of shape [batch, length], have the field's usual names so that other tools can run
    the exported graph too: `input_ids`, `attention_mask`, and with token types `token_type_ids`.
    Output: `logits`, float32 of shape [batch, 1].
    """

    def __init__(self, model: PreTrainedModel, classes: tuple[int, ...] = ()) -> None:
        """Wrap a model with one label, or with two; see `qrank.bundle.family.Family`."""
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the class."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits: torch.Tensor = self.model(**inputs).logits.float()
        if self.classes:
            first, second = self.classes
            return logits[:, first : first + 1] - logits[:, second : second + 1]
        return logits


class EncoderDecoderScorer(torch.nn.Module):
    """An encoder-decoder that scores at the first step of its decoder.

    Inputs and output are those of `EncoderScorer`, without token types.
    """

    def __init__(self, model: PreTrainedModel, head: torch.Tensor) -> None:
        """Wrap a T5.

        Args:
            model: transformers' own model.
            head: the score's row, float32 [hidden].
        """
        super().__init__()
        self.model = model
        self._start = start_token(model)
        # T5 multiplies its last hidden state by this; T5 1.1 and mT5 do not.
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        scale = model.config.d_model**-0.5 if scaled else 1.0
        self.head = torch.nn.Parameter(head.detach()[None] * scale, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """See the class."""
        read = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask)
        final = self.model.decoder(
            input_ids=torch.full_like(input_ids[:, :1], self._start),
            encoder_hidden_states=read.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state[:, 0]
        return _apply(self.head, final)


class DecoderScorer(torch.nn.Module):
    """A causal model that scores at its last token, after a prefix that was read before.

    It needs no padding mask: tokens do not see the padding on their right. One graph serves both
    uses: first the prefix is read as a batch of one, with all its positions in `keep`; then every
    batch gets the returned keys and values as its prefix and keeps nothing.

    Inputs:
        input_ids: int64 [batch, length].
        last: int64 [batch], the position of each sequence's last token.
        prefix: [layers, 2, heads, before, width], its keys and values; `before` may be 0.
        keep: int64 [kept], positions of the first sequence whose keys and values to return, if any.

    Outputs:
        logits: float32 [batch, 1].
        present: [layers, 2, heads, kept, width].
    """

    def __init__(self, model: PreTrainedModel, head: torch.Tensor, max_length: int) -> None:
        """Wrap a model.

        Args:
            model: transformers' own model.
            head: the score's row, float32 [hidden].
            max_length: maximum number of tokens, including the prefix.
        """
        super().__init__()
        self.model = model.base_model
        # The layers with a window: all if the configuration does not distinguish kinds.
        self._kinds = getattr(model.config, "layer_types", None)
        window = getattr(model.config, "sliding_window", None)
        slides = self._kinds is None or "sliding_attention" in self._kinds
        shortens = slides and window is not None and window < max_length
        self._window = window if shortens else None
        self.head = torch.nn.Parameter(head.detach().clone(), requires_grad=False)

    @property
    def prefix_shape(self) -> tuple[int, ...]:
        """The shape of an empty prefix."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return config.num_hidden_layers, 2, config.num_key_value_heads, 0, width

    def forward(
        self,
        input_ids: torch.Tensor,
        last: torch.Tensor,
        prefix: torch.Tensor,
        keep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        batch, length = input_ids.shape
        before = prefix.shape[3]
        places = torch.arange(length, device=input_ids.device) + before
        others = torch.arange(before + length, device=input_ids.device)[None]
        seen = others <= places[:, None]

        def mask(seen: torch.Tensor) -> torch.Tensor:
            lowest = torch.finfo(prefix.dtype).min
            return torch.where(seen, 0.0, lowest).to(prefix.dtype)[None, None]

        full = mask(seen)
        masks: torch.Tensor | dict[str, torch.Tensor] = full
        if self._window is not None:
            # As transformers' `sliding_window_overlay`: the window ends with the token itself.
            near = mask(seen & (others > places[:, None] - self._window))
            kinds = {"full_attention": full, "sliding_attention": near}
            masks = near if self._kinds is None else kinds
        cache = _Cache(prefix, keep)

        def at_last(hidden: torch.Tensor) -> torch.Tensor:
            return hidden.gather(1, last[:, None, None].expand(batch, 1, hidden.shape[2]))

        # The last layer's result is read at one token: its feed-forward block computes that alone,
        # and its addition gives the others a wrong one, which nobody reads.
        block = self.model.layers[-1].mlp
        hook = block.register_forward_pre_hook(lambda _, given: (at_last(given[0]),))
        try:
            hidden = self.model(
                input_ids=input_ids,
                attention_mask=masks,
                position_ids=places[None].expand(batch, length),
                past_key_values=cache,
                use_cache=False,
            ).last_hidden_state
        finally:
            hook.remove()
        return _apply(self.head, at_last(hidden)[:, 0]), torch.stack(cache.kept)


class _Cache:
    """The KV cache for transformers' attention: the prefix's keys and values, then the batch's."""

    def __init__(self, prefix: torch.Tensor, keep: torch.Tensor) -> None:
        self._prefix = prefix
        self._keep = keep
        self.kept: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both, of shape [batch, heads, length, width], with the prefix's in front."""
        kept = [x[0].index_select(1, self._keep) for x in (keys, values)]
        self.kept.append(torch.stack(kept))
        # By index: OpenVINO multiplies by ones to expand.
        every = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        before = self._prefix[layer][:, None].index_select(1, every)
        return torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)

    def get_seq_length(self, layer: int = 0) -> int:
        """Number of tokens of the prefix."""
        return self._prefix.shape[3]
