"""An HTTP dialect: the requests, answers and errors of one reranking API."""

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
        servers: names of the servers that have this API.
        description: of its operations in OpenAPI.
        paths: paths that clients POST to.
        field: a field that only its requests have, if dialects share a path; None: this dialect
            gets the requests that no other one claims.
        request: the pydantic model of a request's body.
        answer: the type that `render` returns.
        parse: request -> task; may raise RequestError.
        render: request and outcome of its task -> body of the answer.
        error: status and message -> the dialect's status and body.
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
    """The dialects of a server, found by path."""

    def __init__(
        self, dialects: Iterable[Dialect[Any]], *, elsewhere: Mapping[str, ErrorShape]
    ) -> None:
        """Register dialects.

        Args:
            dialects: in the order in which OpenAPI lists their paths. The first of a path gives the
                shape of errors for which the body does not say the dialect.
            elsewhere: path without a dialect -> shape of its errors; "" for all other paths.

        Raises:
            ValueError: two dialects of a path have the same `field`.
        """
        self._dialects = tuple(dialects)
        self._elsewhere = elsewhere
        self._by_path: dict[str, list[Dialect[Any]]] = {}
        for dialect in self._dialects:
            for path in dialect.paths:
                self._by_path.setdefault(path, []).append(dialect)
        # Errors before the body is read have the shape of the first in the given order.
        self._first = {path: found[0] for path, found in self._by_path.items()}
        for path, found in self._by_path.items():
            # Those with a field are checked first.
            found.sort(key=lambda dialect: dialect.field is None)
            fields = [dialect.field for dialect in found]
            if len(set(fields)) < len(fields):
                raise ValueError(f"dialects of {path} with the same field: {fields}")

    @property
    def paths(self) -> list[str]:
        """All paths, in the order of the dialects."""
        return list(self._by_path)

    @property
    def servers(self) -> list[str]:
        """All servers whose APIs these are."""
        return list(dict.fromkeys(name for dialect in self._dialects for name in dialect.servers))

    def at(self, path: str) -> list[Dialect[Any]]:
        """The dialects of a path, those with a `field` first; [] if it has none."""
        return self._by_path.get(path, [])

    def of(self, path: str, body: object) -> Dialect[Any]:
        """The dialect of a request to one of `paths`, given its body as JSON or validated."""
        return _claiming(self._by_path[path], body)

    def request(self, path: str) -> Any:
        """The type of a body at one of `paths`: a model, or a union of models."""
        dialects = self._by_path[path]
        if len(dialects) == 1:
            return dialects[0].request
        members = tuple(Annotated[each.request, Tag(tag(each.name))] for each in dialects)
        return Annotated[
            Union[members],  # noqa: UP007 - known at run time only
            Discriminator(lambda body: tag(_claiming(dialects, body).name)),
        ]

    def answer(self, path: str) -> Any:
        """The type of an answer at one of `paths`."""
        return Union[tuple(each.answer for each in self._by_path[path])]  # noqa: UP007

    def error(self, path: str) -> ErrorShape:
        """The shape of errors at a path before the body is read."""
        if path in self._first:
            return self._first[path].error
        return self._elsewhere.get(path) or self._elsewhere[""]


def _claiming(dialects: list[Dialect[Any]], body: object) -> Dialect[Any]:
    """The first dialect whose request the body is, or else the last."""
    for dialect in dialects:
        if isinstance(body, dialect.request):
            return dialect
        if isinstance(body, Mapping) and dialect.field in body:
            return dialect
    return dialects[-1]
