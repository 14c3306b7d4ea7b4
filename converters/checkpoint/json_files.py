"""A checkpoint's JSON files: read and checked, with errors that name the key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from qrank.errors import ConversionError


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a damaged checkpoint into a ConversionError."""
    try:
        yield
    except Exception as error:  # OSError, TypeError, SafetensorError, ...: they share no base
        reason = " ".join(str(error).split())
        raise ConversionError(f"{what}: {reason}") from error


def read_json(path: Path, kind: type, source: str, name: str = "") -> Any:
    """A JSON file of a checkpoint.

    Args:
        path: the file's path.
        kind: the expected type: dict or list.
        source: the checkpoint's name in errors.
        name: the file's name in errors; "" for its own name.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is not JSON of that type.
    """
    name = name or path.name
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{source}: {name} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        expected = "object" if kind is dict else "array"
        raise ConversionError(f"{source}: {name} is not a JSON {expected}")
    return content


def check_kinds(
    content: dict[str, Any], kinds: Mapping[str, tuple[type, ...]], file: str, source: str
) -> None:
    """Check that keys of a JSON file, if present, have the types that transformers expects.

    Raises:
        ConversionError: a key has another type.
    """
    for key, kind in kinds.items():
        if key in content and type(content[key]) not in kind:
            names = " or ".join(_NAMES[k] for k in kind)
            raise ConversionError(
                f"{source}: {file} has {key} = {content[key]!r}; expected {names}"
            )


_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    NoneType: "null",
    str: "a text",
}
