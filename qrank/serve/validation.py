"""Messages of pydantic's errors, for clients: without the names of pydantic's types or qrank's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WANTED = "wanted"
"""Type of an error whose message says what to send instead."""

_SHOWN = 3
"""Maximum errors in a message; the others mostly repeat these."""

_NAMES = {
    "string_type": "a string",
    "list_type": "a list",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "dict_type": "an object",
    "model_attributes_type": "an object",
}
"""Type of an error -> what to send instead."""

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def tag(name: str) -> str:
    """The tag of a union's member; messages omit it from a location."""
    return f"<{name}>"


def reasons(errors: Sequence[Any]) -> str:
    """One message for pydantic's errors. It does not repeat what was sent."""
    return "; ".join(_reason(error) for error in errors[:_SHOWN])


def _reason(error: dict[str, Any]) -> str:
    place, kind = _place(error["loc"]), error["type"]
    if kind == "missing":
        return f"{place} is missing"
    if kind == "too_short":
        return f"{place} is empty; give at least {error['ctx']['min_length']} item"
    wanted = error["msg"] if kind == WANTED else _NAMES.get(kind)
    if wanted is not None:
        return f"{place} is {_KINDS.get(type(error['input']), 'something else')}; give {wanted}"
    if kind == "literal_error":
        return f"{place}: give {error['ctx']['expected']}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"


def _place(location: Sequence[int | str]) -> str:
    """("body", "documents", 1, "<object>", "text") -> documents[1].text."""
    place = ""
    for step in location[1:]:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not step.startswith("<"):
            place += f".{step}"
    return place.removeprefix(".") or "the body"
