"""Parse untrusted JSON: any problem is a ValueError, or an InputError of one line."""

from __future__ import annotations

import json
from typing import Any

from qrank.errors import InputError

MAX_DEPTH = 100
"""Levels of a record: Python's own writer fails at some hundred, other tools earlier."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, but very deep nesting raises ValueError instead of RecursionError.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def parse_object(line: str, where: str, expected: str) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: text of the line.
        where: file and line, for errors.
        expected: what the line should hold, for errors.

    Raises:
        InputError: the line is not a JSON object, or is nested deeper than `MAX_DEPTH`.
    """
    try:
        record = parse_json(line)
        if not isinstance(record, dict):
            found = _shown(line)
        elif _deep(line, record):
            found = f"JSON that is nested more than {MAX_DEPTH} levels deep"
        else:
            return record
    except json.JSONDecodeError:
        found = _shown(line)
    except ValueError as error:  # nested too deeply, or a number with too many digits
        found = str(error)
    raise InputError(f"{where}: expected {expected}, found {found}")


def _shown(line: str) -> str:
    return repr(line[:60].strip()) if line.strip() else "an empty line"


def _deep(text: str, record: dict[str, Any]) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
