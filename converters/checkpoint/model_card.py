"""What a checkpoint's model card says about its language and licence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

CARD = "README.md"

_KEYS = ("language", "license", "license_name", "license_link")
"""Keys of the hub's front matter that hold for a converted model too."""

log = logging.getLogger("qrank")


def read_card(folder: Path) -> dict[str, Any]:
    """Language and licence from the front matter of a folder's README.md, if it says so."""
    from huggingface_hub import metadata_load  # imported here: slow

    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path) or {}
    except Exception as error:  # YAML's errors, and those of decoding, share no base
        log.warning("%s: its front matter cannot be read: %s", path, " ".join(str(error).split()))
        return {}
    return {key: found[key] for key in _KEYS if _is_text(found.get(key))}


def _is_text(value: Any) -> bool:
    """Whether a value is a text, or a list of texts."""
    texts = value if isinstance(value, list) and value else [value]
    return all(isinstance(text, str) for text in texts)
