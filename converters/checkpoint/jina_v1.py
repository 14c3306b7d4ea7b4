"""jina-reranker-v1, read as a class of qrank's: transformers 5 has none.

Its repository brings code of its own (jinaai/jina-bert-implementation), which is not run. Its
config.json claims to be BERT's and has no number of labels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qrank.converters.checkpoint.rewriting import ONE_LABEL, Rewriting, brings, check_keys
from qrank.converters.checkpoint.stored import parts_of, safetensors_files

_CONFIG = "JinaBertConfig"
"""The repository's own configuration class."""

_EXPECTED = {
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
}


def rewriting(folder: Path, config: dict[str, Any], source: str) -> Rewriting | None:
    """The class for jina-reranker-v1; None for other checkpoints.

    Raises:
        FamilyError: config.json asks for what the class does not compute.
    """
    if not brings(config, _CONFIG):
        return None
    check_keys(config, _EXPECTED, "jina's BERT", source)
    made = {key: value for key, value in config.items() if key not in ("auto_map", "num_labels")}
    made |= {
        "architectures": ["JinaBertForSequenceClassification"],
        "model_type": "jina_bert",
        **ONE_LABEL,
    }
    return Rewriting("jina-reranker-v1", made, partial(safetensors_files, folder, source), parts_of)
