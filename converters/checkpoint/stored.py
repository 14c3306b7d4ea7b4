"""A checkpoint's weights: parts of the tensors in its safetensors files, and computed ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qrank.bundle.sequences import Floats
from qrank.converters.checkpoint.json_files import explained, read_json
from qrank.errors import ConversionError, FamilyError
from qrank.system.extras import need

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"

_PIECE = 2**24
"""Number of elements read at once."""


class Weight(Protocol):
    """A weight of a model, read when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def computed(self) -> bool:
        """Whether it is computed in fp32, so that another data type would change it."""

    def tensor(self) -> torch.Tensor:
        """All of it, in its stored data type; in fp32 if it is computed."""

    def row(self, number: int) -> Floats:
        """One row, in fp32."""

    def rows(self, first: int = 0) -> Iterator[Floats]:
        """The rows from `first` on in fp32, some at a time."""


@dataclass(frozen=True)
class Part:
    """Some rows of a stored tensor; nothing is read yet.

    The file is reopened for each read: data read from an open file stays in memory.

    Attributes:
        path: the file.
        name: the tensor's name in it.
        shape: the part's shape.
        start: its first row in the tensor.
        factor: multiplies the values, in fp32.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    start: int = 0
    factor: float = 1.0

    @property
    def computed(self) -> bool:
        """Whether it is not as stored."""
        return self.factor != 1

    def tensor(self) -> torch.Tensor:
        """The whole part."""
        with _opened(self.path) as file:
            found: torch.Tensor = file.get_tensor(self.name)
        if self.shape:
            found = found[self.start : self.start + self.shape[0]]
        return found.float() * self.factor if self.computed else found

    def split(self, count: int) -> list[Part]:
        """Its rows in equal parts, in order: a fused matrix's."""
        rows, *rest = self.shape[0] // count, *self.shape[1:]
        starts = range(self.start, self.start + count * rows, rows)
        return [replace(self, shape=(rows, *rest), start=start) for start in starts]

    def row(self, number: int) -> Floats:
        """One row, in fp32."""
        with _opened(self.path) as file:
            found: Floats = file.get_slice(self.name)[self.start + number].float().numpy()
        return found * np.float32(self.factor)

    def rows(self, first: int = 0) -> Iterator[Floats]:
        """The rows from `first` on in fp32, some at a time."""
        count, *rest = self.shape
        step = max(_PIECE // math.prod(rest), 1)
        for begin in range(first, count, step):
            with _opened(self.path) as file:
                rows = slice(self.start + begin, self.start + min(begin + step, count))
                yield file.get_slice(self.name)[rows].float().numpy() * np.float32(self.factor)


@dataclass(frozen=True)
class Values:
    """A weight that is computed while the checkpoint is read; `values` is in fp32."""

    values: Floats
    computed: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.values.shape

    def tensor(self) -> torch.Tensor:
        """All of it."""
        found: torch.Tensor = need("torch").from_numpy(self.values)
        return found

    def row(self, number: int) -> Floats:
        """One row."""
        found: Floats = self.values[number]
        return found

    def rows(self, first: int = 0) -> Iterator[Floats]:
        """The rows from `first` on."""
        yield self.values[first:]


def parts_of(files: Iterable[Path]) -> dict[str, Part]:
    """The tensors of safetensors files by name.

    Raises:
        ConversionError: a file is damaged.
    """
    found: dict[str, Part] = {}
    for path in files:
        with explained(f"safetensors cannot read {path}"), _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                found[name] = Part(path, name, tuple(file.get_slice(name).get_shape()))
    return found


def safetensors_files(folder: Path, source: str) -> list[Path]:
    """The safetensors files that transformers reads.

    Raises:
        FamilyError: there are none.
        ConversionError: the index file is damaged, or a file that it names is missing.
    """
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, dict, source)
        for key in ("metadata", "weight_map"):
            if not isinstance(index.get(key), dict):
                raise ConversionError(
                    f"{source}: {INDEX} has {key} = {index.get(key)!r}; expected an object"
                )
        places = index["weight_map"]
        names = sorted({str(name) for name in places.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ConversionError(f"{source}: {INDEX} names {name}, which is not in the folder")
        return [folder / name for name in names]
    kinds = (".safetensors", ".bin", ".pt", ".pth")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in kinds)
    raise FamilyError(
        f"{source} has no model.safetensors (found: {', '.join(others) or 'no weights'}); qrank "
        "reads what transformers does, and no pickles: save the model again with save_pretrained, "
        "or name a revision of the hub's that has safetensors (often a pull request: --revision "
        "refs/pr/1)"
    )


def _opened(path: Path) -> Any:
    return need("safetensors").safe_open(path, "pt")
