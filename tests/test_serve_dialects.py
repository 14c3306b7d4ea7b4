"""A new dialect is one object that gets routes, errors in its own form, OpenAPI and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, Field
from serving import serving

from qrank import Reranker
from qrank.serve.app import DIALECTS, build
from qrank.serve.dialect import Dialect
from qrank.serve.request import Limits, RequestError, RerankOutcome, RerankTask

KEY = {"authorization": "Bearer key"}


class ToyRequest(BaseModel):
    """Words to sort by a question."""

    question: str
    words: list[str] = Field(min_length=1)
    model: str | None = None
    wish: int | None = Field(None, description="The status to get.")


class ToyAnswer(BaseModel):
    """The words, best first."""

    best: list[str]
    note: str | None = None


def parse(body: ToyRequest) -> RerankTask:
    if body.wish == 0:
        raise ZeroDivisionError
    if body.wish is not None:
        raise RequestError(body.wish, "as you wish", retry_after=1 if body.wish == 429 else None)
    pairs = [(body.question, word) for word in body.words]
    return RerankTask(body.model, pairs, None, "truncate", None, None)


def render(body: ToyRequest, outcome: RerankOutcome) -> ToyAnswer:
    return ToyAnswer(best=[body.words[i] for i in outcome.order])


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"toy": [status, message]}


TOY = Dialect(
    name="toy",
    servers=("Toys",),
    description="Toys', with `words`.",
    paths=("/toy", "/rerank"),
    field="words",
    request=ToyRequest,
    answer=ToyAnswer,
    parse=parse,
    render=render,
    error=error,
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with two models that requires a key; longer is better."""
    with (
        Reranker("mini", backend="fakes:length") as reranker,
        serving(
            {"one": reranker, "two": reranker},
            keys=(b"key",),
            limits=Limits(documents=3, body=1_000),
            dialects=(*DIALECTS, TOY),
            strict_models=True,
        ) as url,
    ):
        yield url


def ask(url: str, **more: Any) -> httpx.Response:
    return httpx.post(
        url, json={"question": "a", "words": ["a", "a a a", "a a"], **more}, headers=KEY
    )


@pytest.mark.parametrize("path", TOY.paths)
def test_it_answers(url: str, path: str) -> None:
    answer = ask(url + path)
    assert (answer.status_code, answer.json()) == (200, {"best": ["a a a", "a a", "a"]})


def test_its_neighbours_at_a_path_answer_as_before(url: str) -> None:
    def post(**body: Any) -> httpx.Response:
        return httpx.post(f"{url}/rerank", json={"query": "a", **body}, headers=KEY)

    assert [set(item) for item in post(texts=["a"]).json()] == [{"index", "score"}]
    assert "results" in post(documents=["a"]).json()
    assert set(post(texts=[]).json()) == {"error", "error_type"}
    assert set(post(documents=[]).json()) == {"detail"}
    # A request without any dialect's `field` goes to the dialect that has none.
    assert set(post().json()) == {"detail"}


WRONG: list[tuple[int, str, dict[str, Any]]] = [
    (404, "no such model here; there are: one, two", {"model": "three"}),
    (413, "4 documents; a request may have 3 (--max-documents)", {"words": ["a"] * 4}),
    (422, "words is empty; give at least 1 item", {"words": []}),
    (422, "question is a number; give a string", {"question": 3}),
    (429, "as you wish", {"wish": 429}),
    (503, "as you wish", {"wish": 503}),
    (500, "the server made a mistake; its log says which", {"wish": 0}),
]


@pytest.mark.parametrize(("status", "said", "more"), WRONG)
@pytest.mark.parametrize("path", TOY.paths)
def test_its_errors_have_its_shape(
    url: str, path: str, status: int, said: str, more: dict[str, Any]
) -> None:
    answer = ask(url + path, **more)
    assert (answer.status_code, answer.json()) == (status, {"toy": [status, said]})
    assert ("retry-after" in answer.headers) == (status == 429)


def test_errors_before_its_body_is_read_have_its_shape_too(url: str) -> None:
    def status(**request: Any) -> int:
        answer = httpx.post(f"{url}/toy", **{"headers": KEY, **request})
        assert answer.json()["toy"][0] == answer.status_code
        return answer.status_code

    assert status(headers={}) == 401
    assert status(content=b"{", headers={**KEY, "content-type": "application/json"}) == 400
    assert status(content=b"a" * 1_001) == 413
    assert status(content=b"a", headers={**KEY, "content-encoding": "lz4"}) == 415
    answer = httpx.get(f"{url}/toy", headers=KEY)
    assert answer.json() == {"toy": [405, "Method Not Allowed"]}


def test_it_is_described(url: str) -> None:
    api = httpx.get(f"{url}/openapi.json", headers=KEY).json()
    assert api["info"]["description"].endswith("LibreChat, Infinity, Toys.")
    operation = api["paths"]["/toy"]["post"]
    assert operation["operationId"] == "toy_toy_post"
    assert operation["description"] == "Toys', with `words`."
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ToyRequest"}
    shared = api["paths"]["/rerank"]["post"]
    assert shared["operationId"] == "rerank_rerank_post"
    members = shared["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    names = [member["$ref"].rpartition("/")[2] for member in members]
    expected = ["TeiRequest", "NimRequest", "WeaviateRequest", "ToyRequest", "RerankRequest"]
    assert names == expected


def test_it_is_counted(url: str) -> None:
    ask(f"{url}/toy"), ask(f"{url}/toy", words=[])
    counters = httpx.get(f"{url}/metrics", headers=KEY).text
    for status in (200, 422):
        assert f'qrank_requests_total{{path="/toy",status="{status}"}}' in counters


def test_dialects_that_cannot_be_told_apart_are_refused() -> None:
    twin = dataclasses.replace(TOY, name="twin")
    with pytest.raises(ValueError, match="dialects of /toy with the same field"):
        build([], dialects=(TOY, twin))
