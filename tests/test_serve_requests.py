"""Forms of requests: paths, methods, encodings, and error messages."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli
import httpx
import pytest
from serving import serving
from test_serve import EVERY, JSON, QUERY, TEXTS, body, message

from qrank import Reranker
from qrank.serve.encodings import accepted, codecs, decompressed
from qrank.serve.request import Limits, RequestError
from qrank.serve.routing import ALIASES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STATE = ["/health", "/ready", "/info", "/v1/models", "/metrics", "/docs", "/openapi.json"]


@pytest.fixture(scope="module")
def client(length: Reranker) -> Iterator[httpx.Client]:
    with (
        serving({"mini": length}, limits=Limits(body=100_000)) as url,
        httpx.Client(base_url=url, timeout=60) as opened,
    ):
        yield opened


def results(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    found = answer.json()
    items = found if isinstance(found, list) else found.get("results", found.get("data"))
    assert isinstance(items, list)
    return items


@pytest.mark.parametrize("path", [*STATE, "/", "/ping", "/v1/health", "/models"])
def test_head_answers_wherever_get_does(client: httpx.Client, path: str) -> None:
    got, told = client.get(path), client.head(path)
    assert got.status_code == told.status_code == 200
    assert told.content == b""
    assert told.headers["content-type"] == got.headers["content-type"]


def test_head_is_for_what_get_is_for(client: httpx.Client) -> None:
    assert client.head("/v1/rerank").status_code == 405
    assert client.head("/nothing").status_code == 404


@pytest.mark.parametrize("path", EVERY)
def test_slashes_more_are_no_redirect(client: httpx.Client, path: str) -> None:
    url = str(client.base_url).rstrip("/")
    for form in (f"{path}/", f"/{path}", f"/{path}//"):
        assert len(results(client.post(url + form, json=body(path, TEXTS)))) == 5
        refused = client.post(url + form, json={**body(path, TEXTS), "budget_ms": 0})
        assert "budget_ms" in message(path, refused.json())


@pytest.mark.parametrize("path", STATE)
def test_a_slash_behind_the_others_too(client: httpx.Client, path: str) -> None:
    assert client.get(f"{path}/").status_code == 200


def test_other_names_answer_as_the_routes_they_stand_for(client: httpx.Client) -> None:
    for alias, path in {**ALIASES, "/": "/rerank"}.items():
        if path.endswith("rerank"):
            found = client.post(alias, json=body(path, TEXTS))
            assert results(found) == results(client.post(path, json=body(path, TEXTS)))
            refused = client.post(alias, json={**body(path, TEXTS), "budget_ms": 0})
            assert "budget_ms" in message(path, refused.json())
        else:
            assert client.get(alias).json() == client.get(path).json()
    assert client.get("/").json() == {"status": "ok"}
    # llama.cpp's server takes both forms at each of its paths.
    found = client.post("/reranking", json={"query": QUERY, "documents": TEXTS})
    assert [set(x) for x in results(found)] == [{"index", "relevance_score", "document"}] * 5


def test_other_names_are_counted_as_their_routes_and_need_a_key(length: Reranker) -> None:
    with serving({"mini": length}, keys=(b"key",)) as url:
        for path in ("/reranking", "/", "/v1/rerank/", "//v1/rerank"):
            assert httpx.post(f"{url}{path}", json=body("/rerank", TEXTS)).status_code == 401
        for path in ("/", "/ping", "/health/", "/ready/"):
            assert httpx.get(f"{url}{path}").status_code == 200
        for path in ("/models", "/metrics/", "/docs/"):
            assert httpx.get(f"{url}{path}").status_code == 401
        counters = httpx.get(f"{url}/metrics", headers={"authorization": "Bearer key"}).text
    assert 'qrank_requests_total{path="/rerank",status="401"} 2.0' in counters
    assert 'qrank_requests_total{path="/v1/rerank",status="401"} 2.0' in counters
    assert "/ping" not in counters


@pytest.mark.parametrize(
    ("root", "stripped"),
    [("/rank", True), ("/rank", False), ("/a/b", True), ("/v1", False), ("/api", False)],
)
def test_behind_a_proxys_prefix(length: Reranker, root: str, stripped: bool) -> None:
    """Every address in an answer is valid at the proxy, whether it strips the prefix or not."""
    with (
        serving({"mini": length}, root=root) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):

        def there(path: str) -> str:
            """Path that the client requests from the proxy -> path that reaches the server."""
            assert path.startswith(root)
            return path.removeprefix(root) if stripped else path

        page = client.get(there(f"{root}/docs"))
        assert f"{root}/openapi.json" in page.text
        api = client.get(there(f"{root}/openapi.json")).json()
        assert api["servers"] == [{"url": root}]
        for path in EVERY:
            assert path in api["paths"]
            for form in (path, f"{path}/"):
                answer = client.post(there(root + form), json=body(path, TEXTS))
                assert len(results(answer)) == 5
        assert client.get(there(f"{root}/")).json() == {"status": "ok"}
        assert client.head(there(f"{root}/health")).status_code == 200
        missing = client.get(there(f"{root}/nothing"))
        assert missing.status_code == 404
        counters = client.get(there(f"{root}/metrics")).text
    assert 'qrank_requests_total{path="/v1/rerank",status="200"} 2.0' in counters


def bare(content: bytes) -> bytes:
    """Compress with raw deflate, like some clients: without zlib's header."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "br": brotli.compress,
    "zstd": zstd.compress,
    "zstd, br": lambda content: brotli.compress(zstd.compress(content)),
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": bare,
    "identity": bytes,
    "deflate, gzip": lambda content: gzip.compress(zlib.compress(content)),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("path", EVERY)
def test_bodies_may_be_compressed(client: httpx.Client, path: str, coding: str) -> None:
    content = CODINGS[coding](json.dumps(body(path, TEXTS)).encode())
    headers = {**JSON, "content-encoding": coding}
    assert len(results(client.post(path, content=content, headers=headers))) == 5


@pytest.mark.parametrize("path", EVERY)
def test_bodies_that_cannot_be_decompressed(client: httpx.Client, path: str) -> None:
    plain = json.dumps(body(path, TEXTS)).encode()
    whole = gzip.compress(plain)
    wrong = [
        (415, "send gzip, deflate, br, zstd", "lz4", plain),
        (415, "send gzip, deflate", "gzip, gzip, gzip", whole),
        (400, "no gzip", "gzip", plain),
        (400, "no gzip", "gzip", whole[:-9]),
        (400, "no gzip", "gzip", whole + b"more"),
        (400, "no gzip", "gzip", b""),
        (400, "no deflate", "deflate", plain),
        (400, "no br", "br", plain),
        (400, "no br", "br", brotli.compress(plain)[:-3]),
        (400, "no br", "br", brotli.compress(plain) + b"more"),
        (400, "no zstd", "zstd", plain),
        (400, "no zstd", "zstd", zstd.compress(plain)[:-3]),
        (400, "no zstd", "zstd", zstd.compress(plain) + b"more"),
        (413, "100,000 bytes", "br", brotli.compress(b" " * 50_000_000, quality=1)),
        (413, "100,000 bytes", "zstd", zstd.compress(b" " * 50_000_000)),
        (413, "100,000 bytes", "gzip", gzip.compress(b" " * 50_000_000)),
        (413, "100,000 bytes", "deflate", zlib.compress(b" " * 100_001)),
        (413, "100,000 bytes", "gzip, gzip", gzip.compress(gzip.compress(b" " * 10_000_000))),
    ]
    for status, text, coding, content in wrong:
        answer = client.post(path, content=content, headers={**JSON, "content-encoding": coding})
        assert answer.status_code == status, (coding, answer.text)
        assert text in message(path, answer.json())
        assert ("accept-encoding" in answer.headers) is (status == 415)
    for _ in range(20):  # refused requests hold no memory
        test_bodies_may_be_compressed(client, path, "gzip")


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_what_is_decompressed_never_exceeds_the_limit(coding: str) -> None:
    bomb = CODINGS[coding](b"\0" * 10_000_000)
    with pytest.raises(RequestError) as refused:
        decompressed(bomb, coding, 1_000_000)
    assert refused.value.status == 413
    # brotli's limit is not exact.
    assert len(codecs()[coding](bomb, 1_000_000)) < 1_500_000
    assert decompressed(bomb, coding, 10_000_000) == b"\0" * 10_000_000


def test_a_zstd_window_of_more_than_8_mb_is_refused() -> None:
    window: dict[int, int] = {zstd.CompressionParameter.window_log: 26}
    content = zstd.compress(b"ab" * 50_000_000, options=window)
    with pytest.raises(RequestError, match="no zstd"):
        decompressed(content, "zstd", 1_000_000_000)


def test_codecs_that_are_not_installed_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("brotli", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    codecs.cache_clear()
    try:
        assert accepted() == "gzip, deflate"
        with pytest.raises(RequestError, match="send gzip, deflate or no encoding"):
            decompressed(b"", "zstd", 10)
    finally:
        codecs.cache_clear()


EITHER = 'documents[1] is a number; give a string, or an object with "text"'
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("documents", {"documents": ["a", 3]}, EITHER),
    ("documents", {"documents": [None]}, "documents[0] is null; give a string, or an object"),
    ("documents", {"documents": [["a"]]}, "documents[0] is a list; give a string, or an object"),
    ("documents", {"documents": "a"}, "documents is a string; give a list"),
    ("documents", {"documents": {"0": "a"}}, "documents is an object; give a list"),
    ("documents", {"documents": [{"text": 3}]}, "documents[0].text is a number; give a string"),
    ("documents", {"top_n": 1.5}, "top_n is a number; give a whole number"),
    ("documents", {"return_documents": "maybe"}, "is a string; give true or false"),
    ("documents", {"rank_fields": [1]}, "rank_fields[0] is a number; give a string"),
    ("texts", {"texts": ["a", True]}, "texts[1] is a boolean; give a string"),
    ("texts", {"texts": [{"text": "a"}]}, "texts[0] is an object; give a string"),
    ("texts", {"truncation_direction": "up"}, "truncation_direction: give 'Left', 'Right'"),
    ("text_2", {"text_2": 3}, "text_2 is a number; give a string, or a list of strings"),
    ("text_2", {"text_2": ["a", {}]}, "text_2[1] is an object; give a string"),
    ("text_2", {"text_1": []}, "text_1 is empty; give at least 1 item"),
    ("", {"query": 3, "text_1": 3}, "is a number; give a string"),
    ("", {"model": []}, "model is a list; give a string"),
    ("", {"budget_ms": "soon"}, "budget_ms is a string; give a number"),
    ("", {"long_documents": 3}, "long_documents: give 'truncate', 'tail' or 'chunk'"),
]  # fmt: skip


@pytest.mark.parametrize("path", EVERY)
def test_errors_say_what_was_sent_and_what_to_send(client: httpx.Client, path: str) -> None:
    good = body(path, TEXTS)
    for field, wrong, text in WRONG:
        if field in good or not field:
            answer = client.post(path, json={**good, **wrong})
            assert answer.status_code == 422
            said = message(path, answer.json())
            assert text in said, said
            for ours in ("function", "[_", "Text", "Document", "Tag", "union", "tag", "<"):
                assert ours not in said


def test_an_error_of_many_documents_is_short(client: httpx.Client) -> None:
    answer = client.post("/v1/rerank", json={"query": "a", "documents": [3] * 1_000})
    assert len(answer.text) < 300


def test_fields_that_cannot_be_returned_say_why(client: httpx.Client) -> None:
    deep: Any = "a"
    for _ in range(300):
        deep = [deep]
    for more, text in ((deep, "nested too deeply"), ("\ud800", "surrogate pair")):
        content = json.dumps({"query": "a", "documents": [{"text": "mars", "more": more}]})
        answer = client.post("/v1/rerank", content=content, headers=JSON)
        assert answer.json()["detail"].startswith("documents[0]: ")
        assert text in answer.text
