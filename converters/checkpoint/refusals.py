"""Architectures of known rerankers that qrank cannot run: why, and what to use instead."""

from __future__ import annotations

_LISTWISE = (
    "is listwise: the score of a document depends on the others in the request, so no pair has a "
    "score of its own. Use a reranker of pairs, such as Qwen/Qwen3-Reranker-0.6B"
)
_IMAGES = (
    "reads images, and qrank reads text. Use its text-only relative, such as "
    "Qwen/Qwen3-Reranker-0.6B"
)
_LAYERS = (
    "has a score head in every layer and code of its own. Use BAAI/bge-reranker-v2-gemma or "
    "BAAI/bge-reranker-v2-m3"
)
_WHY = {
    "CostWiseGemmaForCausalLM": _LAYERS,
    "HF_ColBERT": (
        "compares token embeddings (late interaction) and is not a reranker of pairs. Use a "
        "cross-encoder, such as cross-encoder/ettin-reranker-32m-v1"
    ),
    "JinaForRanking": _LISTWISE,
    "ListConRankerModel": _LISTWISE,
    "Qwen2VLForConditionalGeneration": _IMAGES,
}

INFERENCE = frozenset({"entailment", "contradiction"})
"""Labels of natural language inference, in lower case."""


def why_not(architectures: list[str]) -> str | None:
    """Why the first known of these architectures cannot run; None if none is known."""
    return next((f"{name} {_WHY[name]}" for name in architectures if name in _WHY), None)
