"""The reference: transformers' own forward pass in fp32."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from qrank.bundle.family import Family, label_row
from qrank.bundle.sequences import Logits, Sequences
from qrank.errors import ConversionError
from qrank.system.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrank.converters.checkpoint.read import Checkpoint


def start_token(model: PreTrainedModel) -> int:
    """The id of an encoder-decoder's first decoder token: the padding token, if none is named.

    Raises:
        ConversionError: config.json names another thing than the id of a token.
    """
    number = getattr(model.config, "decoder_start_token_id", None)
    if number is None:
        number = model.config.pad_token_id
    if type(number) is not int or not 0 <= number < model.config.vocab_size:
        raise ConversionError(
            f"config.json has decoder_start_token_id = {number!r}; expected the id of the token "
            "that the decoder begins with, which is 0 in T5 and mT5"
        )
    return number


class Original:
    """A checkpoint's own model in fp32, loaded when it is first needed.

    Attributes:
        checkpoint: the checkpoint.
        seconds: time spent on forward passes so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.seconds = 0.0

    def logits(self, work: Sequences) -> Logits:
        """See `run_reference`."""
        model = self._model
        begun = time.perf_counter()
        found = run_reference(model, work, self.checkpoint.family)
        self.seconds += time.perf_counter() - begun
        return found

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self.checkpoint.load_to_run()


def run_reference(model: PreTrainedModel, work: Sequences, family: Family) -> Logits:
    """Logits of transformers' own forward pass in fp32, one pair at a time, shape [n].

    Args:
        model: transformers' own model.
        work: whole sequences.
        family: the checkpoint's; its labels or classes say which logits are the score.
    """
    torch = need("torch")
    logits = []
    with torch.inference_mode():
        for i, sequence in enumerate(work.ids):
            inputs = {"input_ids": torch.tensor(sequence[None], dtype=torch.int64)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if work.segments is not None:
                types = torch.tensor(work.segments[i][None], dtype=torch.int64)
                inputs["token_type_ids"] = types
            if family.labels:
                # The vocabulary's logits at the last token, or at the decoder's first step.
                if family.decoder:
                    inputs["logits_to_keep"] = 1
                else:
                    inputs["decoder_input_ids"] = torch.tensor([[start_token(model)]])
                last = model(**inputs).logits[0, -1].double()
                logits.append(label_row(last[list(family.labels)]).item())
            else:
                (row,) = model(**inputs).logits
                score = label_row(row[list(family.classes)]) if family.classes else row
                logits.append(score.item())
    if not np.isfinite(logits).all():
        raise ConversionError("the checkpoint itself gives scores that are not finite")
    return np.array(logits, np.float32)
