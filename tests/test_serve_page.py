"""The page at /: who gets it, with which headers, and what its files may contain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources

import httpx
import pytest
from serving import process, serving
from test_serve import QUERY, TEXTS

from qrank import Reranker
from qrank.serve.page import FILES

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def source(name: str) -> str:
    return resources.files("qrank.serve").joinpath("static", name).read_text("utf-8")


@pytest.fixture(scope="module")
def client(length: Reranker) -> Iterator[httpx.Client]:
    with serving({"mini": length}) as url, httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.mark.parametrize("path", FILES)
def test_a_browser_gets_the_page(client: httpx.Client, path: str) -> None:
    name, kind = FILES[path]
    got, told = client.get(path, headers=HTML), client.head(path, headers=HTML)
    assert got.status_code == told.status_code == 200
    assert got.text == source(name)
    assert told.content == b""
    for answer in (got, told):
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.headers["vary"] == "accept"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= {*policy}
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in " ".join(policy)


@pytest.mark.parametrize("path", FILES)
def test_what_has_not_changed_is_not_sent_again(client: httpx.Client, path: str) -> None:
    first = client.get(path, headers=HTML)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for given in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(path, headers={**HTML, "if-none-match": given})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(path, headers={**HTML, "if-none-match": '"other"'}).status_code == 200


def test_programs_get_what_tei_answers(client: httpx.Client) -> None:
    for accept in ("*/*", "application/json", ""):
        assert client.get("/", headers={"accept": accept}).json() == {"status": "ok"}
    # A browser's own request too: its fields tell, not its headers.
    found = client.post("/", json={"query": QUERY, "texts": TEXTS}, headers=HTML)
    assert [set(item) for item in found.json()] == [{"index", "score"}] * len(TEXTS)
    assert client.put("/", headers=HTML).status_code == 405
    assert not {*FILES} & {*client.get("/openapi.json").json()["paths"]}


def test_the_page_needs_no_key_but_its_requests_do(length: Reranker) -> None:
    with serving({"mini": length}, keys=(b"key",)) as url:
        for path in FILES:
            assert httpx.get(url + path, headers=HTML).status_code == 200
        for path in ("/info", "/openapi.json"):
            assert httpx.get(url + path, headers=HTML).status_code == 401
        body = {"query": QUERY, "documents": TEXTS}
        assert httpx.post(f"{url}/v1/rerank", json=body).status_code == 401


def test_it_can_be_switched_off() -> None:
    with process("mini", "--no-page") as (url, _):
        for path in FILES:
            refused = httpx.get(url + path, headers=HTML)
            assert refused.status_code == 404
            assert "requests go to /rerank, /v1/rerank" in refused.json()["detail"]
        assert httpx.get(url).json() == {"status": "ok"}
        found = httpx.post(url, json={"query": QUERY, "texts": TEXTS})
        assert len(found.json()) == len(TEXTS)


def test_its_addresses_are_right_behind_a_proxy(length: Reranker) -> None:
    with serving({"mini": length}, root='/a"b') as url:
        for path in ('/a"b', '/a"b/', "/"):
            page = httpx.get(url + path, headers=HTML).text
            assert '<base href="/a&quot;b/">' in page


def test_every_address_is_relative() -> None:
    for name, _ in FILES.values():
        hosts = set(re.findall(r"//[\w.-]+\.\w+", source(name)))
        assert hosts <= {"//www.w3.org"}  # SVG's namespace
    for address in re.findall(r'(?:href|src)="([^"]+)"', source("page.html")):
        assert re.match(r"data:|\./$|[a-z.]+$", address), address
    for address in re.findall(r'\b(?:fetch|ask)\("([^"]+)"', source("page.js")):
        assert not address.startswith("/")


def test_it_is_small() -> None:
    assert sum(len(source(name).encode()) for name, _ in FILES.values()) < 27_000


PAIRS = [
    *[(text, ground) for text in ("text", "muted", "accent") for ground in ("ground", "tint")],
    *[("text", "surface"), ("muted", "surface"), ("on-accent", "accent"), ("bad", "bad-tint")],
]


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rgb or #rrggbb."""
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_is_enough(theme: int) -> None:
    """WCAG's AA: 4.5 for text, 3 for the borders of fields."""
    found = re.findall(r"--([\w-]+): light-dark\(#(\w+), #(\w+)\)", source("page.css"))
    colours = {name: luminance(both[theme]) for name, *both in found}

    def contrast(first: str, second: str) -> float:
        low, high = sorted((colours[first], colours[second]))
        return (high + 0.05) / (low + 0.05)

    for pair in PAIRS:
        assert contrast(*pair) >= 4.5, pair
    for pair in (("border", "ground"), ("border", "surface")):
        assert contrast(*pair) >= 3, pair
