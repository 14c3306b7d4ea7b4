"""nvidia's llama-nemotron-rerank: a bidirectional Llama that transformers has no class for.

The checkpoint's own code is not run: this module computes the same with transformers' layers.
Importing it registers the class with transformers and needs torch.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from qrank.converters.checkpoint.encoder_parts import padding_mask
from qrank.errors import FamilyError


class LlamaBidirectionalConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's configuration, plus pooling and temperature.

    Attributes:
        pooling: how the final hidden states become one vector; only `avg` is supported.
        temperature: the logit is divided by this.
    """

    model_type = "llama_bidirec"  # `configuration.NEMOTRON`, which imports this file
    pooling: str = "avg"
    temperature: float = 1.0


class LlamaBidirectionalForSequenceClassification(LlamaPreTrainedModel):  # type: ignore[misc]
    """Every token sees all others; the score is a row times the mean of the final hidden states.

    Raises:
        FamilyError: the configuration asks for another pooling or for causal attention.
    """

    config_class = LlamaBidirectionalConfig

    def __init__(self, config: LlamaBidirectionalConfig) -> None:
        super().__init__(config)
        if config.pooling != "avg":
            raise FamilyError(f"config.json has pooling = {config.pooling!r}; supported is: 'avg'")
        if getattr(config, "is_causal", False):
            raise FamilyError("config.json has is_causal = true; supported is: false")
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Logits of shape [batch, labels]; both inputs are int64 of shape [batch, length]."""
        batch, length = input_ids.shape
        dtype = self.model.embed_tokens.weight.dtype
        mask = padding_mask(attention_mask, dtype)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=mask.expand(batch, 1, length, length),
            use_cache=False,
        ).last_hidden_state
        # Scale each token first: a sum over thousands of them exceeds fp16's range.
        shares = attention_mask.float() / attention_mask.sum(1, keepdim=True)
        pooled = (hidden.float() * shares[..., None]).sum(1)
        logits = self.score(pooled.to(self.score.weight.dtype)) / self.config.temperature
        return SequenceClassifierOutput(logits=logits)


AutoConfig.register(LlamaBidirectionalConfig.model_type, LlamaBidirectionalConfig)
AutoModelForSequenceClassification.register(
    LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
)
