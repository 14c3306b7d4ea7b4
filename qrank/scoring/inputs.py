"""Texts, pairs and model inputs: read from users' arguments, and grouped for a backend."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, MappingView, Sequence, Set
from typing import Any, Literal, NamedTuple

import numpy as np

from qrank.bundle.sequences import Ids, Segments, Sequences
from qrank.errors import InputError
from qrank.scoring.arguments import wrong

LongDocuments = Literal["truncate", "tail", "chunk"]


class ModelInput(NamedTuple):
    """One model input: a query with (a part of) a document; `ids` follow the prefix."""

    owner: int
    prefix: Ids
    ids: Ids
    segments: Segments | None
    truncated: bool
    part: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        """Number of tokens the model reads for it, prefix included."""
        return len(self.prefix) + len(self.ids)


def group_by_prefix(inputs: Sequence[ModelInput]) -> list[tuple[list[int], Sequences]]:
    """Inputs as sequences with their indices; several inputs with one prefix form a group.

    All others go into one group, with their prefixes repeated: a prefix that is used once saves
    nothing, and groups run one after the other.
    """
    groups: dict[bytes, list[int]] = {}
    for place, each in enumerate(inputs):
        groups.setdefault(each.prefix.tobytes(), []).append(place)
    shared = [places for prefix, places in groups.items() if prefix and len(places) > 1]
    taken = {place for places in shared for place in places}
    single = [place for place in range(len(inputs)) if place not in taken]
    found = []
    if single:
        chosen = [inputs[place] for place in single]
        segments = [each.segments for each in chosen if each.segments is not None]
        sequences = [np.concatenate((each.prefix, each.ids)) for each in chosen]
        found.append((single, Sequences(sequences, segments or None)))
    for places in shared:
        chosen = [inputs[place] for place in places]
        found.append((places, Sequences([each.ids for each in chosen], prefix=chosen[0].prefix)))
    return found


def stops_by_size(sizes: Sequence[int], most: int) -> Iterator[int]:
    """Where to stop in a list of items of these sizes, whenever their sum reaches `most`."""
    passed = 0
    for place, size in enumerate(sizes, 1):
        passed += size
        if place == len(sizes) or passed >= most:
            yield place
            passed = 0


def as_text(value: object, what: str) -> str:
    """Convert a string from an array or a column (NumPy's, or an Arrow scalar) to a plain `str`.

    Args:
        value: to be read.
        what: its name in error messages.

    Raises:
        InputError: it is not a string.
    """
    if isinstance(value, str):
        # Not NumPy's class, nor another subclass, which may override methods.
        return str.__str__(value)
    if hasattr(value, "as_py"):
        return as_text(value.as_py(), what)
    kind = type(value).__name__
    advice = f"; {_ADVICE[kind]}" if kind in _ADVICE else ""
    raise InputError(f"{what} is {kind}, not a string{advice}")


_ADVICE = {
    "NoneType": 'give "" where there is no text',
    "bytes": "decode it",
    "list": "give one text, not a list of them",
}
"""What to do about values that are given for texts, by their types."""


def as_texts(
    values: Iterable[str | Mapping[str, Any]], name: str, each: str, text_key: str | None = None
) -> list[str]:
    """The texts of a list, an array, a column, a generator.

    Args:
        values: to be read.
        name: the argument's.
        each: the name of one text in error messages.
        text_key: the field that holds the text of a dictionary; None: there may be none.

    Raises:
        InputError: one has no text, or iterating over `values` would not give the texts in order.
    """
    texts = []
    for place, item in enumerate(_items(values, name, "strings")):
        what = f"{each} {place}"
        if text_key is not None and isinstance(item, Mapping):
            if text_key not in item:
                keys = reprlib.repr(list(item))
                raise InputError(
                    f"{what} has no field {text_key!r}, only {keys}; name the one that holds the "
                    "text (text_key)"
                )
            what, item = f"field {text_key!r} of {what}", item[text_key]
        texts.append(as_text(item, what))
    return texts


def as_pairs(values: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """(query, document) pairs; each may be any iterable of two texts: a tuple, list or array row.

    Raises:
        InputError: as for `as_texts`; or an item is not a pair.
    """
    pairs = []
    for i, item in enumerate(_items(values, "pairs", "(query, document) pairs", "items")):
        pair = item.as_py() if hasattr(item, "as_py") else item
        if isinstance(pair, str | bytes | Mapping | Set) or not isinstance(pair, Iterable):
            raise _no_pair(i, item)
        if len(both := list(pair)) != 2:
            raise _no_pair(i, item)
        pairs.append((as_text(both[0], f"query {i}"), as_text(both[1], f"document {i}")))
    return pairs


def _no_pair(place: int, value: object) -> InputError:
    return InputError(f"pair {place} is no (query, document) pair, but {reprlib.repr(value)}")


def _items(values: object, name: str, kind: str, part: str = "values") -> Iterator[Any]:
    """The items of an argument, in order.

    Args:
        values: the argument.
        name: its name.
        kind: what it should contain.
        part: what to suggest if it is a mapping: its `values` or its `items`.

    Raises:
        InputError: it cannot be iterated over, or would not give the wanted items in order.
    """
    wanted = f"a list of {kind}"
    if isinstance(values, str):
        raise InputError(f"{name} is one string; give {wanted}")
    if isinstance(values, Mapping):
        raise InputError(
            f"{name} is a {type(values).__name__}, which would be read by its keys; "
            f"give {wanted}, such as list({name}.{part}())"
        )
    # A dictionary's keys and items are sets too, but have an order.
    if isinstance(values, Set) and not isinstance(values, MappingView):
        raise InputError(
            f"{name} is a {type(values).__name__}, which has no order to tell results "
            f"by; give {wanted}"
        )
    # Tables of pandas, polars and Arrow have this attribute.
    if hasattr(values, "columns"):
        raise InputError(
            f"{name} is a {type(values).__name__}, which would be read by its columns;"
            f" give {wanted}: one column, or the rows as a list or an array"
        )
    if isinstance(values, bytes | bytearray):
        raise wrong(name, values, wanted)
    try:
        return iter(values)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise wrong(name, values, wanted) from None
