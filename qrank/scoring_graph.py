"""The torch module that is exported: token ids in, one logit a sequence out.

Imported by converters and the torch backend alone: it needs torch.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


class EncoderScorer(torch.nn.Module):
    """A cross-encoder with one label, as transformers computes it.

    Inputs, int64 of shape [batch, length], under the field's usual names so that other tools can
    run the exported graph too: `input_ids`, `attention_mask`, and with token types
    `token_type_ids`. Output: `logits`, float32 of shape [batch, 1].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

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
        logits: torch.Tensor = self.model(**inputs).logits
        return logits.float()
