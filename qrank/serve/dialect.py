"""An HTTP dialect: what a kind of client sends, and the answers and errors that it understands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union

from pydantic import BaseModel, Discriminator, Tag

from qrank.serve.request import RerankOutcome, RerankTask
from qrank.serve.validation import tag

Body = TypeVar("Body", bound=BaseModel)

ErrorShape = Callable[[int, str], tuple[int, dict[str, Any]]]
"""Status and message -> the dialect's status and body."""


@dataclass(frozen=True, kw_only=True)
class Dialect(Generic[Body]):
    """One dialect; to add one, write a file like `dialect_tei.py` and list it in `app.DIALECTS`.

    Attributes:
        name: of its operations in OpenAPI.
        servers: whose API it is.
        description: of its operations in OpenAPI.
        paths: where it is spoken, by POST.
        field: what tells its requests from those of another dialect at the same path; None: they
            are what is left.
        request: model of a request's body.
        answer: what `render` returns, as a type for OpenAPI.
        parse: a body -> the task; may raise RequestError.
        render: a body and the outcome of its task -> the answer's body.
        error: see `ErrorShape`.
    """

    name: str
    servers: tuple[str, ...]
    description: str
    paths: tuple[str, ...]
    field: str | None = None
    request: type[Body]
    answer: Any
    parse: Callable[[Body], RerankTask]
    render: Callable[[Body, RerankOutcome], Any]
    error: ErrorShape


class Dialects:
    """The dialects of a server, by path."""

    def __init__(
        self, dialects: Iterable[Dialect[Any]], *, elsewhere: Mapping[str, ErrorShape]
    ) -> None:
        """Take dialects.

        Args:
            dialects: in the order in which OpenAPI lists their paths.
            elsewhere: shapes of errors at paths of no dialect; "" stands for all others.

        Raises:
            ValueError: two dialects of a path cannot be told from each other.
        """
        self._dialects = tuple(dialects)
        self._elsewhere = elsewhere
        self._by_path: dict[str, list[Dialect[Any]]] = {}
        for dialect in self._dialects:
            for path in dialect.paths:
                self._by_path.setdefault(path, []).append(dialect)
        for path, found in self._by_path.items():
            # Those with a field are asked first.
            found.sort(key=lambda dialect: dialect.field is None)
            fields = [dialect.field for dialect in found]
            if len(set(fields)) < len(fields):
                raise ValueError(f"dialects of {path} with the same field: {fields}")

    @property
    def paths(self) -> list[str]:
        """Every path where one is spoken."""
        return list(self._by_path)

    @property
    def servers(self) -> list[str]:
        """Whose APIs they are."""
        return list(dict.fromkeys(name for dialect in self._dialects for name in dialect.servers))

    def at(self, path: str) -> list[Dialect[Any]]:
        """Those of a path, those with a field first; [] where there is none."""
        return self._by_path.get(path, [])

    def of(self, path: str, body: object) -> Dialect[Any]:
        """The dialect of a body, as JSON or validated, at one of `paths`."""
        return _claiming(self._by_path[path], body)

    def request(self, path: str) -> Any:
        """The type of a body at one of `paths`: a model, or a union of models."""
        dialects = self._by_path[path]
        if len(dialects) == 1:
            return dialects[0].request
        members = tuple(Annotated[each.request, Tag(tag(each.name))] for each in dialects)
        return Annotated[
            Union[members],  # noqa: UP007 - they are known at run time only
            Discriminator(lambda body: tag(_claiming(dialects, body).name)),
        ]

    def answer(self, path: str) -> Any:
        """The type of an answer at one of `paths`."""
        return Union[tuple(each.answer for each in self._by_path[path])]  # noqa: UP007

    def error(self, path: str) -> ErrorShape:
        """The shape of errors at a path as long as nobody has read the body."""
        if dialects := self.at(path):
            return dialects[0].error
        return self._elsewhere.get(path) or self._elsewhere[""]


def _claiming(dialects: list[Dialect[Any]], body: object) -> Dialect[Any]:
    """The dialect that a body belongs to."""
    for dialect in dialects:
        if isinstance(body, dialect.request):
            return dialect
        if isinstance(body, Mapping) and dialect.field in body:
            return dialect
    return dialects[-1]
