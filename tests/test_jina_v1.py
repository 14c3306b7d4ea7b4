"""jina-reranker-v1's layers, compared with those that others wrote: llama.cpp's jina-bert-v2.

llama.cpp has no dense layer in that head, so the mean of the last hidden states is compared.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from test_conformance import PAIRS

from qrank.backends import llama
from qrank.backends.gguf import GgufBackend
from qrank.converters.checkpoint.evened_weights import Weights
from qrank.converters.checkpoint.ids import encode_pairs
from qrank.converters.checkpoint.read import read_checkpoint
from qrank.converters.gguf import layouts, tensors
from qrank.scoring.memory import MemoryBudget


def test_its_layers_are_those_of_llama_cpp(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(str(checkpoint_of("jina-reranker-v1")))
    model = checkpoint.load()
    head = ("bert.pooler.dense", "classifier")
    layout = layouts.Layout("jina-bert-v2", dict.fromkeys(head, "cls"))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", layout.arch)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_layer_norm_eps(model.config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_tokenizer_model("none")
    writer.add_token_type_count(model.config.type_vocab_size)
    writer.add_vocab_size(model.config.vocab_size)
    weights = Weights(checkpoint.folder, {})
    for tensor in tensors.tensors_of(weights, model.config, layout, checkpoint):
        if not tensor.name.startswith("cls"):
            whole = np.concatenate(list(tensor.pieces()))
            writer.add_tensor(tensor.name, whole.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    work = encode_pairs(PAIRS, json.dumps(checkpoint.text_tokenizer()), checkpoint.family)
    row = np.random.default_rng(1).standard_normal(model.config.hidden_size).astype(np.float32)
    states = []
    model.bert.encoder.layer[-1].register_forward_hook(lambda _, __, out: states.append(out))
    with torch.inference_mode():
        for ids in work.ids:
            row_of_ids = torch.tensor(ids[None], dtype=torch.int64)
            model(row_of_ids, torch.ones_like(row_of_ids))
    ours = np.array([state[0].mean(0).numpy() @ row for state in states])
    memory = MemoryBudget.beside(0, None, checkpoint.dimensions)
    loaded = llama.load(tmp_path / "model.gguf", "cpu")
    backend = GgufBackend(loaded, row, 4, threads=1, memory=memory)
    theirs = backend.logits(work)
    backend.close()
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * float(np.ptp(theirs)))
    assert max(work.lengths) > 100, "distances that ALiBi grows with"
