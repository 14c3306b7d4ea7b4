"""Behaviour at lengths that no probe reaches: attention windows and scaled positions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qrank.converters.checkpoint.configuration import whole_number
from qrank.converters.checkpoint.qwen_vl import HYBRID
from qrank.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger("qrank")

WINDOWED = ("mistral", "qwen2", "qwen3")
"""Causal models (`model_type`) whose windows `checkpoint/scoring_graph.py` builds."""


def window(settings: PretrainedConfig, max_length: int, source: str) -> int | None:
    """The size of a causal model's sliding window; None if no layer has one below `max_length`.

    Args:
        settings: the checkpoint's configuration.
        max_length: maximum number of tokens of a pair.
        source: the checkpoint's name in errors.

    Raises:
        FamilyError: a layer's kind of attention is not supported.
    """
    if getattr(settings, "use_bidirectional_attention", None) or not getattr(
        settings, "is_causal", True
    ):
        raise FamilyError(
            f"{source}: config.json lets every token see those behind it (is_causal, "
            "use_bidirectional_attention); qrank reads causal models that do not"
        )
    kinds = set(getattr(settings, "layer_types", None) or ())
    if settings.model_type in HYBRID:
        kinds -= {"linear_attention"}
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise FamilyError(
            f"{source}: config.json has layers of {', '.join(unknown)} (layer_types); qrank builds "
            "full_attention and sliding_attention"
        )
    if kinds == {"full_attention"}:
        return None
    if getattr(settings, "sliding_window", None) is None:
        if kinds:
            raise FamilyError(
                f"{source}: config.json has layers of sliding_attention (layer_types), and no "
                "sliding_window that is in use"
            )
        return None
    size = whole_number(settings, "sliding_window", source)
    if size >= max_length:
        return None
    if settings.model_type not in WINDOWED:
        raise FamilyError(
            f"{source}: config.json has sliding_window = {size}, and a pair may have {max_length} "
            f"tokens; qrank builds windows of: {', '.join(WINDOWED)}. A card with max_length = "
            f"{size} (--family FILE.toml) reads it up to there"
        )
    return size


def rotary_limit(settings: PretrainedConfig, source: str) -> int | None:
    """Tokens up to which rotary positions are scaled alike; None if scaling never changes.

    Raises:
        FamilyError: the configuration's RoPE parameters are invalid.
    """
    parameters: dict[str, Any] = getattr(settings, "rope_parameters", None) or {}
    # Models with several kinds of layers have one dictionary per kind.
    kinds = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for kind in kinds:
        if not isinstance(kind.get("rope_type", "default"), str):
            raise FamilyError(
                f"{source}: config.json has rope_type = {kind['rope_type']!r} in rope_parameters; "
                "expected a text"
            )
    limits = []
    for kind in kinds:
        if kind.get("rope_type") != "longrope":
            continue
        limit = kind.get("original_max_position_embeddings")
        if type(limit) is not int or limit < 1:
            raise FamilyError(
                f"{source}: config.json scales positions by longrope and has "
                f"original_max_position_embeddings = {limit!r}; expected a whole number"
            )
        limits.append(limit)
    if limits:
        log.warning(
            "%s: positions beyond %d tokens are scaled by other factors (longrope), which would "
            "change every score of a batch: qrank reads up to there",
            source,
            min(limits),
        )
    return min(limits, default=None)
